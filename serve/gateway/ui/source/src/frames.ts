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

const CLOUDS = /\.(bin|npy|npz|pcd|ply|las|laz)$/i;
const IMAGES = /\.(jpe?g|png|webp|bmp|tiff?|jp2|gif|avif|p[pgbn]m|pam|pfm|hdr|pic|sr|ras|exr|dib)$/i;
const PART = /^(points|image(\..+)?|calibration|sweeps|sweep\.\d+|text)$/;
/** Files that mark a folder as a frame of several parts. */
const MARKERS = /(^|\/)(calibration|sweeps)\.json$/;

export function listFrames(dropped: Dropped[]): Frame[] {
  const files = dropped
    .filter(({ path }) => !path.split("/").some((word) => word.startsWith(".") || word === "Thumbs.db"))
    .sort((a, b) => a.path.localeCompare(b.path, "en", { numeric: true }));
  const folders = new Set(files.filter(({ path }) => MARKERS.test(path)).map(({ path }) => folderOf(path)));
  const frames = new Map<string, Frame>();
  for (const { path, file } of files) {
    const folder = folderOf(path);
    const isPart = folders.has(folder);
    const stem = stemOf(path);
    // Elsewhere files of one name belong together: velodyne/000008.bin, image_2/000008.png, calib/000008.txt.
    const key = isPart ? `${folder}/` : stem;
    const frame = frames.get(key) ?? { name: isPart ? lastOf(folder) || "frame" : stem, parts: new Map() };
    const part = isPart && PART.test(stem) ? stem : kindOf(path);
    if (!frame.parts.has(part)) frame.parts.set(part, file);
    else frames.set(path, { name: lastOf(path), parts: new Map([[part, file]]) });
    if (!frames.has(key)) frames.set(key, frame);
  }
  const listed = [...frames.values()].filter(({ parts }) => parts.size > 1 || !parts.has("calibration"));
  // A frame of one file has the file's whole name.
  return listed.map(({ name, parts }) => ({ name: parts.size > 1 ? name : [...parts.values()][0].name, parts }));
}

function kindOf(path: string): string {
  if (CLOUDS.test(path)) return "points";
  if (IMAGES.test(path)) return "image";
  return /\.(json|txt)$/i.test(path) ? "calibration" : "data";
}

function folderOf(path: string): string {
  return path.includes("/") ? path.slice(0, path.lastIndexOf("/")) : "";
}

function lastOf(path: string): string {
  return path.slice(path.lastIndexOf("/") + 1);
}

function stemOf(path: string): string {
  return lastOf(path).replace(/\.[^.]+$/, "");
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
