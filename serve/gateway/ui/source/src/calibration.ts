/** Calibrations: JSON with OpenMMLab's names (docs/answers.md), and KITTI's calib/*.txt. */

import { Matrix, multiply, square } from "./geometry";
import { BoxKind } from "./model";

type Matrices = Record<string, number[][]>;

export interface Calibration {
  /** The matrix that projects boxes of this kind into the image of a camera ("" if there is one). */
  projection(kind: BoxKind, camera: string): Matrix | null;
}

const NEEDED: Record<BoxKind, string> = { Camera: "cam2img", Depth: "depth2img", LiDAR: "lidar2img" };

export function parseCalibration(text: string): Calibration {
  const document: Record<string, unknown> = text.trimStart().startsWith("{") ? JSON.parse(text) : readKitti(text);
  return {
    projection(kind, camera) {
      const own = (camera && document[camera] ? document[camera] : document) as Matrices;
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
  const matrices = readKitti(text);
  if (!Object.keys(matrices).length) return parts;
  return new Map([...parts, ["calibration", new File([JSON.stringify(matrices)], "calibration.json")]]);
}

/** KITTI's lines `P2: 12 numbers`; the cloud's points go through Tr_velo_to_cam and R0_rect to the left colour camera. */
function readKitti(text: string): Matrices {
  const rows = new Map<string, number[]>();
  for (const line of text.split("\n")) {
    const [name, numbers] = line.split(":");
    if (numbers) rows.set(name.trim(), numbers.trim().split(/\s+/).map(Number));
  }
  const matrix = (name: string, width: number): Matrix => {
    const numbers = rows.get(name) ?? [];
    return square([0, 1, 2].map((row) => numbers.slice(row * width, (row + 1) * width)));
  };
  if (!rows.has("P2")) return {};
  return {
    cam2img: matrix("P2", 4),
    lidar2cam: multiply(matrix("R0_rect", 3), matrix("Tr_velo_to_cam", 4)),
  };
}
