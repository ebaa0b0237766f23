/** PCD and PLY by three's loaders. */

import { BufferGeometry } from "three";
import { PCDLoader } from "three/examples/jsm/loaders/PCDLoader.js";
import { PLYLoader } from "three/examples/jsm/loaders/PLYLoader.js";
import { Cloud } from "./cloud";

export function readPcd(buffer: ArrayBuffer): Cloud {
  return fromGeometry(new PCDLoader().parse(buffer).geometry);
}

/** Read a PLY; `intensity` is the property that holds it, if there is one. */
export function readPly(buffer: ArrayBuffer, intensity: string | undefined): Cloud {
  const loader = new PLYLoader();
  // A property that the file does not have would be read as not a number.
  if (intensity !== undefined) loader.setCustomPropertyNameMapping({ intensity: [intensity] });
  return fromGeometry(loader.parse(buffer));
}

function fromGeometry(geometry: BufferGeometry): Cloud {
  const position = geometry.getAttribute("position");
  const intensity = geometry.getAttribute("intensity");
  const colour = geometry.getAttribute("color");
  return {
    count: position?.count ?? 0,
    positions: position ? new Float32Array(position.array) : new Float32Array(),
    intensity: intensity ? new Float32Array(intensity.array) : null,
    // The loaders turn colours of the file into linear ones; back to what was in it.
    colours: colour ? Uint8Array.from(colour.array, (value) => 255 * linearToSrgb(value)) : null,
  };
}

function linearToSrgb(value: number): number {
  return value <= 0.0031308 ? 12.92 * value : 1.055 * value ** (1 / 2.4) - 0.055;
}
