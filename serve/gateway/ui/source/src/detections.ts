/** An answer as a list of detections, whatever the model detects. */

import { Answer, BoxKind, RunLengths } from "./model";

export interface Detection {
  index: number;
  label: number;
  name: string;
  score: number;
  id?: number;
  box3d?: number[];
  box2d?: number[];
  mask?: RunLengths;
}

/** What the user wants to see of an answer; asks the server nothing. */
export interface Filter {
  minScore: number;
  hidden: Set<string>;
}

export function listDetections(answer: Answer): Detection[] {
  const is3d = answer.bboxes_3d !== undefined;
  const boxes = (is3d ? answer.bboxes_3d : answer.bboxes) ?? [];
  const scores = (is3d ? answer.scores_3d : answer.scores) ?? [];
  const labels = (is3d ? answer.labels_3d : answer.labels) ?? [];
  return boxes.map((box, index) => ({
    index,
    label: labels[index] ?? 0,
    name: answer.names?.[index] ?? answer.classes?.[labels[index]] ?? String(labels[index]),
    // JSON has no NaN: a score that is none arrives as null.
    score: index in scores ? (scores[index] ?? NaN) : 1,
    id: trackId(answer.track_ids?.[index]),
    // A box that has no place is listed, not drawn; velocities behind the place do not count.
    box3d: is3d && box.slice(0, 7).every(Number.isFinite) ? box : undefined,
    box2d: !is3d && box.slice(0, 4).every(Number.isFinite) ? box : undefined,
    mask: answer.masks?.[index],
  }));
}

function trackId(id: number | undefined): number | undefined {
  return id === undefined || id < 0 ? undefined : id;
}

/** The frame of an answer's boxes; that of its model if it has none. */
export function boxKind({ box_type_3d: kind }: Answer, expected: BoxKind): BoxKind {
  return kind === "Camera" || kind === "Depth" || kind === "LiDAR" ? kind : expected;
}

export function isShown(detection: Detection, filter: Filter): boolean {
  return !(detection.score < filter.minScore) && !filter.hidden.has(detection.name);
}

/** Name and id, as everywhere on the page. */
export function nameOf({ name, id }: Detection): string {
  return id === undefined ? name : `${name} #${id}`;
}

export function scoreOf({ score }: Detection): string {
  return Number.isNaN(score) ? "–" : score.toFixed(2);
}

/**
 * The detection of the next frame that continues `former`: the one with its id, else the nearest of its class within
 * `reach` (metres in 3D, pixels in 2D); null if there is none.
 */
export function continueDetection(former: Detection, next: Detection[], reach: number): Detection | null {
  const same = former.id === undefined ? undefined : next.find((each) => each.id === former.id);
  if (same) return same;
  const from = centreOf(former);
  let best: Detection | null = null;
  let nearest = reach;
  for (const each of next) {
    if (each.label !== former.label) continue;
    const distance = Math.hypot(...centreOf(each).map((value, axis) => value - from[axis]));
    if (distance <= nearest) [best, nearest] = [each, distance];
  }
  return best;
}

function centreOf({ box3d, box2d }: Detection): number[] {
  if (box3d) return box3d.slice(0, 3);
  return box2d ? [(box2d[0] + box2d[2]) / 2, (box2d[1] + box2d[3]) / 2] : [0, 0];
}
