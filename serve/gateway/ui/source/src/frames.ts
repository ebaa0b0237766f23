/** Dropped files to frames: a file each, or several parts of one frame (docs/answers.md#frames-of-several-parts). */

import { Model } from "./model";

export interface Dropped {
  /** Path below what was dropped, with slashes. */
  path: string;
  file: File;
}

export interface Frame {
  name: string;
  /** Files by the name of their part; a file of unknown kind is `data`. */
  parts: Map<string, File>;
}

/** Frames, and the paths of files in folders that are no frames. */
export interface Listed {
  frames: Frame[];
  leftOut: string[];
}

type Kind = "points" | "image" | "calibration" | "data";

interface Found extends Dropped {
  kind: Kind;
  /** Names of the folders above. */
  folders: string[];
  stem: string;
}

const CLOUDS = /\.(bin|npy|npz|pcd|ply|las|laz)$/i;
const IMAGES = /\.(jpe?g|png|webp|bmp|tiff?|jp2|gif|avif|p[pgbn]m|pam|pfm|hdr|pic|sr|ras|exr|dib)$/i;
const PART = /^(points|image(\..+)?|calibration|sweeps|sweep\.\d+|text)$/;
/** Files that mark a folder as a frame of several parts. */
const MARKERS = /^(calibration|sweeps)\.json$/;

export function listFrames(dropped: Dropped[]): Listed {
  const all = dropped
    .filter(({ path }) => !path.split("/").some((word) => word.startsWith(".") || word === "Thumbs.db"))
    .sort((a, b) => a.path.localeCompare(b.path, "en", { numeric: true }))
    .map(look);
  const isKnown = all.some(({ kind }) => kind === "points" || kind === "image");
  const leftOut = all.filter(({ kind, folders }) => isKnown && kind === "data" && folders.length);
  const byFolder = groups(all.filter((file) => !leftOut.includes(file)), ({ folders }) => folders.join("/"));
  const frames: [Found, Frame][] = [];
  const shared = new Map<string, File>();
  const single: Found[] = [];
  for (const [folder, files] of byFolder) {
    const marker = files.find(({ path }) => MARKERS.test(lastOf(path)));
    const parts = new Map(files.map((file) => [PART.test(file.stem) ? file.stem : file.kind, file.file]));
    if (marker && parts.size === files.length) {
      frames.push([files[0], { name: lastOf(folder) || "frame", parts }]);
      continue;
    }
    // Beside frames of other names a calibration is that of all of them.
    if (marker?.stem === "calibration") shared.set(folder, marker.file);
    single.push(...files.filter((file) => file !== marker));
  }
  for (const files of groups(single, ({ stem }) => stem).values()) frames.push(...pair(files));
  for (const [{ folders }, { parts }] of frames) {
    const above = folders.map((_, k) => folders.slice(0, folders.length - k).join("/"));
    const found = [...above, ""].find((folder) => shared.has(folder));
    if (found !== undefined && !parts.has("calibration")) parts.set("calibration", shared.get(found)!);
  }
  const order = new Map(all.map((file, k) => [file, k]));
  frames.sort(([a], [b]) => order.get(a)! - order.get(b)!);
  const seen = frames.filter(([, { parts }]) => parts.size > 1 || !parts.has("calibration"));
  return { frames: nameApart(seen), leftOut: leftOut.map(({ path }) => path) };
}

/**
 * Files of one name to frames: each cloud (without clouds, each image) is one, and a file of another kind belongs to
 * that with which it shares the most folders: velodyne/000008.bin, image_2/000008.png, calib/000008.txt.
 */
function pair(files: Found[]): [Found, Frame][] {
  const kinds: Kind[] = ["points", "image", "data", "calibration"];
  const kind = kinds.find((each) => files.some((file) => file.kind === each));
  const heads = files.filter((file) => file.kind === kind);
  const frames = heads.map((head): [Found, Frame] => [head, { name: head.stem, parts: new Map([[head.kind, head.file]]) }]);
  // Of KITTI's cameras the left one in colour is that of the labels; of text files the one in calib/ is the calibration.
  const isFirst = ({ path }: Found): boolean => /(^|\/)(image_0?2|calib\w*)\//i.test(path);
  const others = files.filter((file) => file.kind !== kind);
  for (const file of [...others.filter(isFirst), ...others.filter((each) => !isFirst(each))]) {
    const near = frames.map(([head]) => shareOf(head.folders, file.folders));
    const most = Math.max(...near);
    const nearest = frames.filter((_, k) => near[k] === most).map(([, frame]) => frame);
    const frame = nearest.find(({ parts }) => !parts.has(file.kind)) ?? nearest[0];
    if (!frame.parts.has(file.kind)) frame.parts.set(file.kind, file.file);
    else if (file.kind === "image") frame.parts.set(`image.${cameraOf(file)}`, file.file);
  }
  return frames;
}

/** Name of a second camera: the folder that its images are in; KITTI's raw recordings have image_03/data. */
function cameraOf({ folders, path }: Found): string {
  const folder = folders.filter((name) => name !== "data").at(-1);
  return folder ? folder.replace(/^image_0(\d)$/, "image_$1") : lastOf(path);
}

function shareOf(a: string[], b: string[]): number {
  const differs = a.findIndex((name, k) => name !== b[k]);
  return differs < 0 ? a.length : differs;
}

/** A frame of one file has the file's whole name; before those of one name are the folders in which they differ. */
function nameApart(frames: [Found, Frame][]): Frame[] {
  const named = frames.map(([head, { name, parts }]) => ({ head, name: parts.size > 1 ? name : lastOf(head.path), parts }));
  const same = groups(named, ({ name }) => name);
  return named.map(({ head, name, parts }) => {
    const others = same.get(name)!.map((each) => each.head.folders);
    const differing = head.folders.filter((folder, k) => others.some((folders) => folders[k] !== folder));
    return { name: [...differing, name].join("/"), parts };
  });
}

function groups<T>(values: T[], keyOf: (value: T) => string): Map<string, T[]> {
  const found = new Map<string, T[]>();
  for (const value of values) {
    const key = keyOf(value);
    if (!found.has(key)) found.set(key, []);
    found.get(key)!.push(value);
  }
  return found;
}

function look({ path, file }: Dropped): Found {
  return { path, file, kind: kindOf(path), folders: path.split("/").slice(0, -1), stem: lastOf(path).replace(/\.[^.]+$/, "") };
}

function kindOf(path: string): Kind {
  if (CLOUDS.test(path)) return "points";
  if (IMAGES.test(path)) return "image";
  return /\.(json|txt)$/i.test(path) ? "calibration" : "data";
}

function lastOf(path: string): string {
  return path.slice(path.lastIndexOf("/") + 1);
}

/** The parts of a frame that this model takes; if it is none of them, the file itself: the server says what is wrong. */
export function partsFor(frame: Frame, model: Model): Map<string, File> {
  const wanted = model.parts ?? (model.modality === "image" ? ["image"] : ["points"]);
  const isTaken = (name: string): boolean => wanted.includes(name) || /^sweeps$|^sweep\./.test(name);
  const taken = new Map([...frame.parts].filter(([name]) => isTaken(name)));
  return taken.size ? taken : new Map([...frame.parts].slice(0, 1));
}

/** All files below what was dropped, folders included. */
export async function filesOf(transfer: DataTransfer): Promise<Dropped[]> {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.() ?? null);
  if (entries.some(Boolean)) {
    return (await Promise.all(entries.filter((entry) => entry !== null).map((entry) => walk(entry)))).flat();
  }
  return [...transfer.files].map((file) => ({ path: file.name, file }));
}

/** Files of an input, with their folders if it takes folders. */
export function filesOfInput(input: HTMLInputElement): Dropped[] {
  return [...(input.files ?? [])].map((file) => ({ path: file.webkitRelativePath || file.name, file }));
}

async function walk(entry: FileSystemEntry, above = ""): Promise<Dropped[]> {
  const path = above + entry.name;
  if (entry.isFile) {
    const file = await new Promise<File>((resolve, reject) => (entry as FileSystemFileEntry).file(resolve, reject));
    return [{ path, file }];
  }
  const reader = (entry as FileSystemDirectoryEntry).createReader();
  const found: FileSystemEntry[] = [];
  for (;;) {
    // A call gives some of the entries, and none when all were given.
    const some = await new Promise<FileSystemEntry[]>((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) break;
    found.push(...some);
  }
  return (await Promise.all(found.map((each) => walk(each, `${path}/`)))).flat();
}
