/** Calibrations: JSON with OpenMMLab's names (docs/answers.md), and KITTI's calib/*.txt. */

import { Matrix, multiply, square } from "./geometry";
import { BoxKind, PageError } from "./model";

type Matrices = Record<string, number[][]>;

export interface Calibration {
  /** The matrix that projects boxes of this kind into the image of a camera ("" if there is one). */
  projection(kind: BoxKind, camera: string): Matrix | null;
  /** The matrix from the frame of the cloud to that of a camera. */
  toCamera(camera: string): Matrix | null;
}

const NEEDED: Record<BoxKind, string> = { Camera: "cam2img", Depth: "depth2img", LiDAR: "lidar2img" };

/** Names of matrices that the page uses. */
const MATRICES = ["cam2img", "lidar2cam", "lidar2img", "depth2img"];

/**
 * Parse a calibration.
 *
 * @throws PageError if it is neither JSON nor of KITTI's lines, or one of its matrices is not of numbers.
 */
function readDocument(text: string): Record<string, unknown> {
  const trimmed = text.trim();
  if (!trimmed.startsWith("{")) {
    const found = readKitti(trimmed);
    if (!found.cam2img) {
      throw new PageError(`its text begins with ${JSON.stringify(trimmed.slice(0, 40))} and has no line P2: with 12 numbers; send KITTI's calib/*.txt, or JSON`);
    }
    return found;
  }
  let document: Record<string, unknown>;
  try {
    document = JSON.parse(trimmed);
  } catch (error) {
    throw new PageError(`it is not JSON (${error instanceof Error ? error.message : error}); write it with a JSON encoder, without NaN`);
  }
  const cameras = Object.values(document).filter((each): each is object => typeof each === "object" && each !== null);
  for (const matrices of [document, ...cameras] as Record<string, unknown>[]) {
    for (const name of MATRICES) {
      const matrix = matrices[name];
      if (matrix !== undefined && !isMatrix(matrix)) {
        throw new PageError(`${name} is ${(JSON.stringify(matrix) ?? "").slice(0, 60)}; send its rows, 3 or 4 of 3 or 4 numbers each`);
      }
    }
  }
  return document;
}

function isMatrix(value: unknown): boolean {
  const isOfSize = (list: unknown): list is unknown[] => Array.isArray(list) && (list.length === 3 || list.length === 4);
  return isOfSize(value) && value.every((row) => isOfSize(row) && row.every(Number.isFinite));
}

/** Parse a calibration; with `isOfOne` matrices that are given for no camera are those of the image without a name. */
export function parseCalibration(text: string, isOfOne: boolean): Calibration {
  const document = readDocument(text);
  const matricesOf = (camera: string): Matrices => {
    if (camera && document[camera]) return document[camera] as Matrices;
    return camera && isOfOne ? {} : (document as Matrices);
  };
  return {
    toCamera(camera) {
      const { lidar2cam } = matricesOf(camera);
      return Array.isArray(lidar2cam) ? square(lidar2cam) : null;
    },
    projection(kind, camera) {
      const own = matricesOf(camera);
      const needed = NEEDED[kind];
      if (Array.isArray(own[needed])) return square(own[needed]);
      if (kind === "LiDAR" && own.cam2img && own.lidar2cam) {
        return multiply(square(own.cam2img), square(own.lidar2cam));
      }
      return null;
    },
  };
}

/** The server reads calibrations as JSON: those of KITTI are rewritten on their way. */
export async function asJson(parts: Map<string, File>): Promise<Map<string, File>> {
  const text = await parts.get("calibration")?.text();
  if (text === undefined || text.trimStart().startsWith("{") || parts.size === 1) return parts;
  const { cam2img, lidar2cam } = readKitti(text) as Matrices;
  if (!cam2img) return parts;
  const json = JSON.stringify({ cam2img, lidar2cam });
  return new Map([...parts, ["calibration", new File([json], "calibration.json")]]);
}

/**
 * KITTI's lines `P2: 12 numbers`, without a colon in its tracking data; the cloud's points go through the velodyne's
 * matrix and the rectification to the left colour camera. The other cameras have their own projections of it.
 */
function readKitti(text: string): Record<string, Matrices | Matrix> {
  const rows = new Map<string, number[]>();
  for (const line of text.split("\n")) {
    const [, name, numbers] = /^\s*(\w+)[:\s]\s*(.*)$/.exec(line) ?? [];
    if (numbers) rows.set(name, numbers.trim().split(/\s+/).map(Number));
  }
  const matrix = (width: number, ...names: string[]): Matrix | null => {
    const numbers = names.map((name) => rows.get(name)).find((each) => each?.length === 3 * width && each.every(Number.isFinite));
    return numbers ? square([0, 1, 2].map((row) => numbers.slice(row * width, (row + 1) * width))) : null;
  };
  const cam2img = matrix(4, "P2");
  if (!cam2img) return {};
  const [rectified, velodyne] = [matrix(3, "R0_rect", "R_rect"), matrix(4, "Tr_velo_to_cam", "Tr_velo_cam")];
  const found: Matrices = { cam2img, ...(rectified && velodyne && { lidar2cam: multiply(rectified, velodyne) }) };
  const cameras: Record<string, Matrices> = {};
  for (const k of [0, 1, 2, 3]) {
    const projection = matrix(4, `P${k}`);
    if (projection) cameras[`image_${k}`] = { ...found, cam2img: projection };
  }
  return { ...found, ...cameras };
}
