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

/** Invert a rotation with a shift. */
export function invertRigid(matrix: Matrix): Matrix {
  const shift = [0, 1, 2].map((row) => -[0, 1, 2].reduce((sum, k) => sum + matrix[k][row] * matrix[k][3], 0));
  return [...[0, 1, 2].map((row) => [matrix[0][row], matrix[1][row], matrix[2][row], shift[row]]), [0, 0, 0, 1]];
}

export function apply(matrix: Matrix, [x, y, z]: Point): Point {
  return matrix.slice(0, 3).map((row) => row[0] * x + row[1] * y + row[2] * z + row[3]) as Point;
}

/** From the frame of the boxes to the scene. */
export function toScene([x, y, z]: Point, kind: BoxKind): Point {
  return kind === "Camera" ? [z, -x, -y] : [x, y, z];
}

/** Least distance from the camera at which lines are drawn, metres. */
const NEAR_M = 0.1;

/** Pixels of the ends of a line, cut to what is in front of the camera; null if that is nothing. */
export function projectLine(matrix: Matrix, from: Point, to: Point): [number, number][] | null {
  const [a, b] = [apply(matrix, from), apply(matrix, to)];
  if (Math.max(a[2], b[2]) < NEAR_M) return null;
  const cut = (end: Point, other: Point): Point => {
    if (end[2] >= NEAR_M) return end;
    const share = (NEAR_M - end[2]) / (other[2] - end[2]);
    return end.map((value, axis) => value + share * (other[axis] - value)) as Point;
  };
  return [cut(a, b), cut(b, a)].map(([u, v, w]) => [u / w, v / w]);
}

export function multiply(a: Matrix, b: Matrix): Matrix {
  return a.map((row) => b[0].map((_, column) => row.reduce((sum, value, k) => sum + value * b[k][column], 0)));
}

/** Extend a matrix of 3 x 3 or 3 x 4 to 4 x 4. */
export function square(matrix: number[][]): Matrix {
  return [0, 1, 2, 3].map((row) => [0, 1, 2, 3].map((column) => matrix[row]?.[column] ?? (row === column ? 1 : 0)));
}
