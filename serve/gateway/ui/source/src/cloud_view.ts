/** The 3D view: a cloud, boxes with headings, names beside them. Drawn only when something changed. */

import {
  BufferAttribute, BufferGeometry, Color, PerspectiveCamera, Points, PolarGridHelper, Scene, Sphere, Vector3,
  WebGLRenderer,
} from "three";
import { OrbitControls } from "three/examples/jsm/controls/OrbitControls.js";
import { LineMaterial } from "three/examples/jsm/lines/LineMaterial.js";
import { LineSegments2 } from "three/examples/jsm/lines/LineSegments2.js";
import { LineSegmentsGeometry } from "three/examples/jsm/lines/LineSegmentsGeometry.js";
import { Cloud } from "./clouds/cloud";
import { Detail } from "./detail";
import { Detection, nameOf, scoreOf } from "./detections";
import { apply, cornersOf, EDGES, headingOf, Matrix, Point, toScene } from "./geometry";
import { drawLabels, Label } from "./labels";
import { BoxKind } from "./model";
import { classColour } from "./palette";
import { ColourBy, PointMaterial } from "./point_material";

const BACKGROUND = 0x0b0f14;
const STEP = Math.PI / 36;
/** Distance from which on a cloud is drawn from an origin of its own. */
const FAR_M = 1000;

export interface SceneBox {
  detection: Detection;
  corners: Vector3[];
  heading: [Vector3, Vector3];
  centre: Vector3;
}

export class CloudView {
  /** Called with the detection that was clicked, or null. */
  onPick: (detection: Detection | null) => void = () => {};
  /** Called when the browser took the graphics card away, and when it gave it back. */
  onContext: (isThere: boolean) => void = () => {};
  private readonly renderer: WebGLRenderer;
  private readonly scene = new Scene();
  private readonly camera = new PerspectiveCamera(55, 1, 0.1, 2000);
  private readonly controls: OrbitControls;
  private readonly material = new PointMaterial();
  private readonly points = new Points(new BufferGeometry(), this.material.shader);
  private readonly lines: LineSegments2;
  private readonly marked: LineSegments2;
  private readonly grid: PolarGridHelper;
  /** The cloud as it is drawn, from `origin` on: on the GPU numbers of a map's size would be too coarse. */
  private cloud: Cloud | null = null;
  private origin: Point = [0, 0, 0];
  private place: (point: Point) => Vector3 = (point) => new Vector3(...point);
  private boxes: SceneBox[] = [];
  private selected: Detection | null = null;
  private isDue = false;
  private pointSize = 1.6;
  private readonly detail = new Detail(() => this.redraw());
  showLabels = true;

  constructor(
    readonly canvas: HTMLCanvasElement,
    private readonly overlay: HTMLCanvasElement,
  ) {
    this.renderer = new WebGLRenderer({ canvas, antialias: true });
    this.scene.background = new Color(BACKGROUND);
    this.camera.up.set(0, 0, 1);
    this.controls = new OrbitControls(this.camera, canvas);
    this.controls.enableDamping = false;
    this.controls.addEventListener("change", () => {
      this.detail.move();
      this.redraw();
    });
    const grid = new PolarGridHelper(100, 8, 10, 96, 0x243242, 0x1b2632);
    grid.rotation.x = Math.PI / 2;
    this.grid = grid;
    this.points.frustumCulled = false;
    this.lines = segments(2);
    this.marked = segments(4);
    this.scene.add(grid, this.points, this.lines, this.marked);
    new ResizeObserver(() => this.resize()).observe(canvas.parentElement!);
    canvas.addEventListener("keydown", (event) => this.onKey(event));
    // What was on the graphics card is sent to it anew with the next picture.
    canvas.addEventListener("webglcontextrestored", () => {
      this.onContext(true);
      this.redraw();
    });
    canvas.addEventListener("webglcontextlost", () => this.onContext(false));
    let down = [0, 0];
    canvas.addEventListener("pointerdown", (event) => (down = [event.clientX, event.clientY]));
    canvas.addEventListener("pointerup", (event) => {
      if (Math.hypot(event.clientX - down[0], event.clientY - down[1]) < 4) this.onPick(this.pick(event));
    });
    this.reset("LiDAR");
  }

  /** Show another cloud; null shows none. */
  setCloud(cloud: Cloud | null): void {
    this.points.geometry.dispose();
    const geometry = new BufferGeometry();
    this.cloud = cloud && this.nearOrigin(cloud);
    if (this.cloud) {
      geometry.setAttribute("position", new BufferAttribute(this.cloud.positions, 3));
      // Nothing is left out by it, and that of a million points, or of points that are no numbers, need not be sought.
      geometry.boundingSphere = new Sphere();
      this.grid.position.z = this.material.describe(this.cloud, geometry);
    }
    this.points.visible = cloud !== null;
    this.points.geometry = geometry;
    this.detail.use(geometry, cloud?.count ?? 0);
    this.redraw();
  }

  /** Give each point the number of a class, or -1; for `colourBy("class")`. */
  setPointLabels(labels: Float32Array): void {
    this.points.geometry.setAttribute("label", new BufferAttribute(labels, 1));
    this.redraw();
  }

  colourBy(what: ColourBy): void {
    this.material.colourBy(what);
    this.redraw();
  }

  setPointSize(pixels: number): void {
    this.pointSize = pixels;
    this.material.setSize(pixels * this.renderer.getPixelRatio());
    this.redraw();
  }

  /** Draw these detections; the selected one thicker. `toCloud` maps their frame to the cloud's if it is another one. */
  setDetections(detections: Detection[], kind: BoxKind, selected: Detection | null, toCloud: Matrix | null = null): void {
    const origin = new Vector3(...this.origin);
    const place = (point: Point): Vector3 => new Vector3(...(toCloud ? apply(toCloud, point) : toScene(point, kind))).sub(origin);
    this.place = place;
    this.selected = selected;
    this.boxes = detections
      .filter((detection) => detection.box3d)
      .map((detection) => {
        const corners = cornersOf(detection.box3d!, kind).map(place);
        const [from, to] = headingOf(detection.box3d!, kind).map(place);
        const centre = corners.reduce((sum, corner) => sum.add(corner), new Vector3()).divideScalar(8);
        return { detection, corners, heading: [from, to], centre };
      });
    fill(this.lines, this.boxes.filter((box) => box.detection !== selected));
    fill(this.marked, this.boxes.filter((box) => box.detection === selected));
    this.redraw();
  }

  /** Move the camera with the selected box from one frame to the next, so that it stays where it is seen. */
  follow(from: Detection, to: Detection): void {
    const [before, after] = [from, to].map(({ box3d }) => this.place(box3d!.slice(0, 3) as Point));
    const step = after.sub(before);
    this.camera.position.add(step);
    this.controls.target.add(step);
    this.controls.update();
  }

  /** Look at a box from nearby, from the present direction. */
  lookAt(detection: Detection): void {
    const box = this.boxes.find((each) => each.detection === detection);
    if (!box) return;
    const offset = this.camera.position.clone().sub(this.controls.target);
    const reach = Math.max(...box.corners.map((corner) => corner.distanceTo(box.centre)));
    offset.setLength(Math.min(offset.length(), Math.max(5 * reach, 8)));
    this.controls.target.copy(box.centre);
    this.camera.position.copy(box.centre).add(offset);
    this.controls.update();
  }

  /** Look from behind and above the sensor, forward. */
  reset(kind: BoxKind): void {
    const reach = this.cloud ? reachOf(this.cloud) : 40;
    this.camera.near = Math.max(0.1, reach / 2000);
    this.camera.far = Math.max(2000, 20 * reach);
    this.camera.updateProjectionMatrix();
    const forward = kind === "Depth" ? new Vector3(0, 1, 0) : new Vector3(1, 0, 0);
    this.controls.target.copy(forward).multiplyScalar(0.35 * reach);
    this.camera.position.copy(forward).multiplyScalar(-0.45 * reach).setZ(0.5 * reach);
    this.controls.update();
    this.redraw();
  }

  /** Look from above, forward up. */
  top(kind: BoxKind): void {
    const distance = this.camera.position.distanceTo(this.controls.target);
    const back = kind === "Depth" ? new Vector3(0, -1, 0) : new Vector3(-1, 0, 0);
    this.camera.position.copy(this.controls.target).addScaledVector(back, 0.001 * distance).z += distance;
    this.controls.update();
  }

  /** Draw at once, so that the canvas can be copied. */
  render(): void {
    this.isDue = false;
    this.detail.measure();
    this.canvas.dataset.drawn = String(this.detail.drawn);
    this.renderer.render(this.scene, this.camera);
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const labels: Label[] = [];
    if (this.showLabels) {
      for (const { detection, corners } of this.boxes) {
        const seen = corners.map((corner) => this.pixelOf(corner));
        if (seen.includes(null)) continue;
        const at = [seen.reduce((sum, pixel) => sum + pixel![0], 0) / 8, Math.min(...seen.map((pixel) => pixel![1]))];
        const text = `${nameOf(detection)} ${scoreOf(detection)}`;
        const isBold = detection === this.selected;
        labels.push({ x: at[0], y: at[1] - 4, text, colour: classColour(detection.label), isBold });
      }
    }
    drawLabels(this.overlay, labels, width, height);
  }

  redraw(): void {
    if (this.isDue) return;
    this.isDue = true;
    this.detail.ask();
    requestAnimationFrame(() => this.render());
  }

  /** The cloud from an origin near it, which stays while a sequence moves on. */
  private nearOrigin(cloud: Cloud): Cloud {
    const centre = centreOf(cloud);
    const isFar = (point: Point, from: Point): boolean => Math.hypot(...point.map((value, axis) => value - from[axis])) > FAR_M;
    if (isFar(centre, this.origin)) this.origin = isFar(centre, [0, 0, 0]) ? (centre.map(Math.round) as Point) : [0, 0, 0];
    const { origin } = this;
    if (!origin.some(Boolean)) return cloud;
    return { ...cloud, positions: cloud.positions.map((value, k) => value - origin[k % 3]) };
  }

  private pixelOf(point: Vector3): [number, number] | null {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const seen = point.clone().project(this.camera);
    return seen.z > 1 ? null : [((seen.x + 1) * width) / 2, ((1 - seen.y) * height) / 2];
  }

  private pick(event: PointerEvent): Detection | null {
    const bounds = this.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - bounds.left, event.clientY - bounds.top];
    let best: Detection | null = null;
    let nearest = Infinity;
    for (const { detection, corners, centre } of this.boxes) {
      const seen = corners.map((corner) => this.pixelOf(corner));
      if (seen.includes(null)) continue;
      const pixels = seen as [number, number][];
      const isInside = [0, 1].every((axis) => {
        const values = pixels.map((pixel) => pixel[axis]);
        const at = axis ? y : x;
        return Math.min(...values) - 4 <= at && at <= Math.max(...values) + 4;
      });
      const distance = centre.distanceTo(this.camera.position);
      if (isInside && distance < nearest) [best, nearest] = [detection, distance];
    }
    return best;
  }

  private resize(): void {
    const { clientWidth: width, clientHeight: height } = this.canvas.parentElement!;
    if (!width || !height) return;
    this.renderer.setPixelRatio(Math.min(devicePixelRatio, 2));
    this.renderer.setSize(width, height, false);
    this.setPointSize(this.pointSize);
    this.camera.aspect = width / height;
    this.camera.updateProjectionMatrix();
    this.render();
  }

  /** Arrows turn, with Shift they move; + and - zoom. */
  private onKey(event: KeyboardEvent): void {
    const arrows: Record<string, [number, number]> = {
      ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1],
    };
    const arrow = arrows[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (arrow && event.shiftKey) this.move(...arrow);
    else if (arrow) this.turn(arrow[0] * STEP, arrow[1] * STEP);
    else if (event.key === "+" || event.key === "=") this.zoom(1 / 1.15);
    else if (event.key === "-") this.zoom(1.15);
    else return;
    event.preventDefault();
  }

  private turn(around: number, down: number): void {
    const offset = this.camera.position.clone().sub(this.controls.target);
    const radius = offset.length();
    const azimuth = Math.atan2(offset.y, offset.x) + around;
    const elevation = Math.min(Math.max(Math.asin(offset.z / radius) - down, -1.55), 1.55);
    offset.set(Math.cos(azimuth) * Math.cos(elevation), Math.sin(azimuth) * Math.cos(elevation), Math.sin(elevation));
    this.camera.position.copy(this.controls.target).addScaledVector(offset, radius);
    this.controls.update();
  }

  private zoom(factor: number): void {
    const offset = this.camera.position.clone().sub(this.controls.target).multiplyScalar(factor);
    this.camera.position.copy(this.controls.target).add(offset);
    this.controls.update();
  }

  private move(right: number, down: number): void {
    const distance = this.camera.position.distanceTo(this.controls.target);
    const across = new Vector3().setFromMatrixColumn(this.camera.matrix, 0);
    const along = new Vector3(0, 0, 1).cross(across).normalize();
    const step = across.multiplyScalar(right).addScaledVector(along, -down).multiplyScalar(0.05 * distance);
    this.camera.position.add(step);
    this.controls.target.add(step);
    this.controls.update();
  }
}

function segments(width: number): LineSegments2 {
  const material = new LineMaterial({ linewidth: width, vertexColors: true });
  const made = new LineSegments2(new LineSegmentsGeometry(), material);
  made.frustumCulled = false;
  made.visible = false;
  return made;
}

function fill(lines: LineSegments2, boxes: SceneBox[]): void {
  const positions: number[] = [];
  const colours: number[] = [];
  for (const { detection, corners, heading } of boxes) {
    const pairs = [...EDGES.map(([i, j]) => [corners[i], corners[j]]), heading];
    const [red, green, blue] = new Color().setRGB(
      ...(classColour(detection.label).map((value) => value / 255) as [number, number, number]), "srgb",
    ).toArray();
    for (const [from, to] of pairs) {
      positions.push(...from.toArray(), ...to.toArray());
      colours.push(red, green, blue, red, green, blue);
    }
  }
  lines.geometry.dispose();
  lines.geometry = new LineSegmentsGeometry();
  lines.visible = boxes.length > 0;
  if (!boxes.length) return;
  lines.geometry.setPositions(positions);
  lines.geometry.setColors(colours);
}

/** Median of x, y and z, of five thousand points. */
function centreOf({ positions, count }: Cloud): Point {
  const step = Math.max(1, Math.floor(count / 5000));
  return [0, 1, 2].map((axis) => {
    const values: number[] = [];
    for (let row = 0; row < count; row += step) {
      if (Number.isFinite(positions[3 * row + axis])) values.push(positions[3 * row + axis]);
    }
    return values.sort((a, b) => a - b)[Math.floor(values.length / 2)] ?? 0;
  }) as Point;
}

/** Distance from the sensor within which nine tenths of the points lie; metres, at least 3. */
function reachOf({ positions, count }: Cloud): number {
  const step = Math.max(1, Math.floor(count / 5000));
  const distances: number[] = [];
  for (let row = 0; row < count; row += step) {
    const distance = Math.hypot(positions[3 * row], positions[3 * row + 1]);
    if (Number.isFinite(distance)) distances.push(distance);
  }
  distances.sort((a, b) => a - b);
  return Math.max(distances[Math.floor(0.9 * distances.length)] ?? 40, 3);
}
