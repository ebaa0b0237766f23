/** How points are drawn: the colour is looked up on the GPU, so that another one costs no work per point here. */

import { BufferAttribute, BufferGeometry, DataTexture, RGBAFormat, ShaderMaterial, Vector2 } from "three";
import { Cloud } from "./clouds/cloud";
import { CLASS_TEXELS, classTexels, rampTexels } from "./palette";

export type ColourBy = "height" | "intensity" | "class" | "rgb";

const MODES: Record<ColourBy, number> = { height: 0, intensity: 1, class: 2, rgb: 3 };

const VERTEX = `
attribute float intensity;
attribute float label;
attribute vec3 rgb;
uniform int mode;
uniform float size;
uniform vec2 heights;
uniform vec2 intensities;
uniform sampler2D ramp;
uniform sampler2D classes;
varying vec3 colour;
void main() {
  vec4 seen = modelViewMatrix * vec4(position, 1.0);
  gl_Position = projectionMatrix * seen;
  gl_PointSize = size * clamp(30.0 / -seen.z, 0.6, 2.5);
  if (mode == 3) colour = rgb;
  else if (mode == 2) {
    colour = label < 0.0 ? vec3(0.42, 0.47, 0.53) : texture2D(classes, vec2((mod(label, ${CLASS_TEXELS}.0) + 0.5) / 256.0, 0.5)).rgb;
  } else {
    vec2 range = mode == 0 ? heights : intensities;
    float value = mode == 0 ? position.z : intensity;
    colour = texture2D(ramp, vec2(clamp((value - range.x) / (range.y - range.x), 0.002, 0.998), 0.5)).rgb;
  }
}`;

const FRAGMENT = `
varying vec3 colour;
void main() {
  gl_FragColor = vec4(colour, 1.0);
}`;

export class PointMaterial {
  readonly shader = new ShaderMaterial({
    vertexShader: VERTEX,
    fragmentShader: FRAGMENT,
    uniforms: {
      mode: { value: 0 },
      size: { value: 1.6 },
      heights: { value: new Vector2(-2, 3) },
      intensities: { value: new Vector2(0, 1) },
      ramp: { value: texture(rampTexels()) },
      classes: { value: texture(classTexels()) },
    },
  });

  /**
   * Add the attributes of a cloud beside its positions, and fit the ranges of the colours to it. Returns the height of
   * its ground, metres: the second percentile.
   */
  describe(cloud: Cloud, geometry: BufferGeometry): number {
    const { uniforms } = this.shader;
    const heights = rangeOf(cloud.positions, 3, 2);
    uniforms.heights.value.set(...heights);
    if (cloud.intensity) {
      geometry.setAttribute("intensity", new BufferAttribute(cloud.intensity, 1));
      uniforms.intensities.value.set(...rangeOf(cloud.intensity, 1, 0));
    }
    if (cloud.colours) geometry.setAttribute("rgb", new BufferAttribute(cloud.colours, 3, true));
    return heights[0];
  }

  colourBy(what: ColourBy): void {
    this.shader.uniforms.mode.value = MODES[what];
  }

  setSize(pixels: number): void {
    this.shader.uniforms.size.value = pixels;
  }
}

function texture(texels: Uint8Array): DataTexture {
  const made = new DataTexture(texels, 256, 1, RGBAFormat);
  made.needsUpdate = true;
  return made;
}

/** Second and ninety-eighth percentile of every `stride`-th value, of ten thousand of them. */
function rangeOf(values: Float32Array, stride: number, offset: number): [number, number] {
  const step = stride * Math.max(1, Math.floor(values.length / stride / 10000));
  const found: number[] = [];
  for (let k = offset; k < values.length; k += step) if (Number.isFinite(values[k])) found.push(values[k]);
  found.sort((a, b) => a - b);
  const low = found[Math.floor(0.02 * found.length)] ?? 0;
  const high = found[Math.floor(0.98 * found.length)] ?? 1;
  return high > low ? [low, high] : [low, low + 1];
}
