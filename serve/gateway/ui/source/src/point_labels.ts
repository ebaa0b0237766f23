/** The class of each point: the model's labels, or that of the box that a point is in. */

import { Cloud } from "./clouds/cloud";
import { Detection } from "./detections";
import { BoxKind } from "./model";

/** Labels of segmented points; those of hidden classes are -1. */
export function keepShown(labels: ArrayLike<number>, classes: string[], hidden: Set<string>): Float32Array {
  return Float32Array.from(labels, (label) => (hidden.has(classes[label]) ? -1 : label));
}

/** Class of the best box around each point, -1 of none; boxes of camera frames have no cloud. */
export function labelByBoxes(cloud: Cloud, detections: Detection[], kind: BoxKind): Float32Array {
  const labels = new Float32Array(cloud.count).fill(-1);
  if (kind === "Camera") return labels;
  const { positions } = cloud;
  const boxes = detections.filter((each) => each.box3d).sort((a, b) => a.score - b.score);
  for (const { box3d, label } of boxes) {
    const [x, y, z, length, width, height, yaw] = box3d!;
    const [cosine, sine] = [Math.cos(yaw), Math.sin(yaw)];
    const reach = Math.hypot(length, width) / 2;
    for (let row = 0, at = 0; row < cloud.count; row++, at += 3) {
      const dx = positions[at] - x;
      if (dx > reach || dx < -reach) continue;
      const dy = positions[at + 1] - y;
      const dz = positions[at + 2] - z;
      const isInside =
        Math.abs(dx * cosine + dy * sine) <= length / 2 &&
        Math.abs(dy * cosine - dx * sine) <= width / 2 &&
        dz >= 0 &&
        dz <= height;
      if (isInside) labels[row] = label;
    }
  }
  return labels;
}
