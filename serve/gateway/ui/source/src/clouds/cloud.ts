/** A point cloud as it is drawn. */

import { PageError } from "../model";

export interface Cloud {
  count: number;
  /** x, y, z of each point, metres. */
  positions: Float32Array;
  intensity: Float32Array | null;
  /** Red, green, blue of each point, 0 to 255. */
  colours: Uint8Array | null;
}

/** Spellings of columns, lower case, by their standard name (serve/protocol/point_table.py). */
const ALIASES: Record<string, string[]> = {
  x: ["x", "x_m"],
  y: ["y", "y_m"],
  z: ["z", "z_m"],
  intensity: ["intensity", "intensities", "i", "reflectance", "reflectivity", "remission", "scalar_intensity"],
  red: ["red", "r", "diffuse_red"],
  green: ["green", "g", "diffuse_green"],
  blue: ["blue", "b", "diffuse_blue"],
};

/** The column that is `name`, as these columns spell it. */
export function spellingOf(name: string, columns: string[]): string | undefined {
  return columns.find((own) => ALIASES[name].includes(own.toLowerCase()));
}

/** Gives the value of column `column` at row `row`. */
export type Reader = (row: number, column: number) => number;

/** Build a cloud of columns in any order and spelling. */
export function arrange(count: number, names: string[], read: Reader): Cloud {
  const place = (name: string): number => {
    for (const spelling of ALIASES[name]) {
      const found = names.findIndex((own) => own.toLowerCase() === spelling);
      if (found >= 0) return found;
    }
    return -1;
  };
  const axes = ["x", "y", "z"].map(place);
  if (axes.includes(-1)) throw new PageError(`the cloud has no x, y, z; its columns are ${names.join(", ")}`);
  const positions = new Float32Array(3 * count);
  for (let row = 0; row < count; row++) {
    for (let axis = 0; axis < 3; axis++) positions[3 * row + axis] = read(row, axes[axis]);
  }
  const brightness = place("intensity");
  const intensity = brightness < 0 ? null : Float32Array.from({ length: count }, (_, row) => read(row, brightness));
  const channels = ["red", "green", "blue"].map(place);
  const colours = channels.includes(-1) ? null : new Uint8Array(3 * count);
  if (colours) {
    // Channels of 16 bits are as common in LAS files as those of 8, and of 0 to 1 in PLY.
    let most = 0;
    for (let row = 0; row < count; row++) most = Math.max(most, read(row, channels[0]), read(row, channels[1]));
    const scale = most > 255 ? 255 / 65535 : most <= 1 ? 255 : 1;
    for (let row = 0; row < count; row++) {
      for (let k = 0; k < 3; k++) colours[3 * row + k] = read(row, channels[k]) * scale;
    }
  }
  return { count, positions, intensity, colours };
}

/** Where the points lie, in words: coordinates in other units or of another frame show at once. */
export function extentOf({ positions, count }: Cloud): string {
  const [low, high] = [[Infinity, Infinity, Infinity], [-Infinity, -Infinity, -Infinity]];
  for (let at = 0; at < 3 * count; at++) {
    const axis = at % 3;
    if (positions[at] < low[axis]) low[axis] = positions[at];
    if (positions[at] > high[axis]) high[axis] = positions[at];
  }
  return Number.isFinite(low[0] + low[1] + low[2]) ? ["x", "y", "z"].map((name, k) => `${name} ${low[k].toFixed(1)} to ${high[k].toFixed(1)}`).join(", ") + " m" : "";
}

/** Columns of a file that does not name them: those of the model, else the usual ones of its sensor. */
export function usualColumns(width: number, isDepth: boolean): string[] {
  const usual = isDepth ? ["x", "y", "z", "red", "green", "blue"] : ["x", "y", "z", "intensity", "ring", "time"];
  return Array.from({ length: width }, (_, k) => usual[k] ?? `column_${k}`);
}
