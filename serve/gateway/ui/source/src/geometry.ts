/**
 * Boxes to corners, and points to pixels.
 *
 * The scene has x forward, y left, z up, in metres. Boxes of LiDAR and depth frames have z up already; camera frames
 * (x right, y down, z forward) are turned.
 */

import { BoxKind } from "./model";

export type Point = [number, number, number];
/** Row by row, 4 x 4. */
export type Matrix = number[][];

/** Corners in units of the box's size, from the centre of its bottom; the first four are its front. */
const CORNERS: Point[] = [];
for (const x of [0.5, -0.5]) for (const y of [-0.5, 0.5]) for (const z of [0, 1]) CORNERS.push([x, y, z]);

/** Pairs of corners that an edge joins. */
export const EDGES: [number, number][] = [];
for (let i = 0; i < 8; i++) {
  for (let j = 0; j < i; j++) {
    const steps = CORNERS[i].reduce((sum, value, axis) => sum + Math.abs(value - CORNERS[j][axis]), 0);
    if (steps === 1) EDGES.push([i, j]);
  }
}

/** Eight corners of a box (x, y, z of its bottom's centre, three sizes, yaw), in the frame of the box. */
export function cornersOf(box: number[], kind: BoxKind): Point[] {
  return CORNERS.map((unit) => placeInBox(unit, box, kind));
}

/** Where the arrow of the heading begins and ends: middle of the bottom, a quarter in front of the front. */
export function headingOf(box: number[], kind: BoxKind): [Point, Point] {
  return [placeInBox([0, 0, 0], box, kind), placeInBox([0.75, 0, 0], box, kind)];
}

function placeInBox([x, y, z]: Point, box: number[], kind: BoxKind): Point {
  const cosine = Math.cos(box[6] ?? 0);
  const sine = Math.sin(box[6] ?? 0);
  if (kind === "Camera") {
    // Turned about y, which points down; the sizes are along x, y, z.
    const [along, across, up] = [x * box[3], y * box[5], z * box[4]];
    return [along * cosine + across * sine + box[0], box[1] - up, -along * sine + across * cosine + box[2]];
  }
  const [along, across, up] = [x * box[3], y * box[4], z * box[5]];
  return [along * cosine - across * sine + box[0], along * sine + across * cosine + box[1], up + box[2]];
}

/** From the frame of the boxes to the scene. */
export function toScene([x, y, z]: Point, kind: BoxKind): Point {
  return kind === "Camera" ? [z, -x, -y] : [x, y, z];
}

/** Pixel and depth of a point; null if it is not in front of the camera. */
export function project(matrix: Matrix, [x, y, z]: Point): Point | null {
  const [u, v, w] = matrix.slice(0, 3).map((row) => row[0] * x + row[1] * y + row[2] * z + row[3]);
  return w < 0.1 ? null : [u / w, v / w, w];
}

export function multiply(a: Matrix, b: Matrix): Matrix {
  return a.map((row) => b[0].map((_, column) => row.reduce((sum, value, k) => sum + value * b[k][column], 0)));
}

/** Extend a matrix of 3 x 3 or 3 x 4 to 4 x 4. */
export function square(matrix: number[][]): Matrix {
  return [0, 1, 2, 3].map((row) => [0, 1, 2, 3].map((column) => matrix[row]?.[column] ?? (row === column ? 1 : 0)));
}
