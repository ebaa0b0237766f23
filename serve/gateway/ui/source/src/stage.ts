/** Shows a frame: its cloud, its images, and what was found in it. */

import { Calibration, parseCalibration } from "./calibration";
import { CloudView } from "./cloud_view";
import { Cloud } from "./clouds/cloud";
import { Layout, readCloud } from "./clouds/read";
import { boxKind, Detection, Filter, isShown } from "./detections";
import { Frame } from "./frames";
import { ImageView, Overlay, Picture } from "./image_view";
import { invertRigid } from "./geometry";
import { decodeMaps, Maps, NO_MAPS } from "./masks";
import { Answer, BoxKind, describe } from "./model";
import { decodePicture } from "./pictures";
import { ColourBy } from "./point_material";
import { keepShown, labelByBoxes } from "./point_labels";
import { Entry } from "./session";

/** Decoded frames that are kept: a sequence plays back and forth without decoding anew. */
const KEPT = 6;

export interface Scene {
  cloud: Cloud | null;
  pictures: Picture[];
  calibration: Calibration | null;
  /** What could not be read here, in sentences. */
  problems: string[];
  /** Whether it is kept for another time; one that is not is closed when it is no longer shown. */
  isKept: boolean;
}

export class Stage {
  scene: Scene | null = null;
  private scenes = new Map<Frame, Promise<Scene>>();
  private shown: Frame | null = null;
  private kind: BoxKind = "LiDAR";
  private expected: BoxKind = "LiDAR";
  /** The kind of boxes that the view was last reset for; null if the next cloud resets it. */
  private viewed: BoxKind | null = null;
  private wanted: Frame | null = null;
  private what: ColourBy = "height";
  /** What was decoded of the answer that was shown last. */
  private mapped: { answer: Answer | undefined; maps: Maps } = { answer: undefined, maps: NO_MAPS };

  constructor(
    readonly cloudView: CloudView | null,
    readonly imageView: ImageView,
    private readonly root: HTMLElement,
  ) {}

  /** Forget decoded frames, for instance because the columns are named otherwise. */
  forget(): void {
    for (const frame of [...this.scenes.keys()]) this.drop(frame);
    this.shown = this.wanted = null;
  }

  /** Look at the next frame anew; else the view stays, so that answers of two models can be compared. */
  forgetView(): void {
    this.viewed = null;
  }

  /** Decode the frame unless it is kept, and draw it. Returns false if another one was asked for meanwhile. */
  async show(entry: Entry, layout: Layout, filter: Filter, selected: Detection | null): Promise<boolean> {
    const { frame, answer } = entry;
    this.wanted = frame;
    this.expected = layout.kind;
    const scene = await this.sceneOf(frame, layout);
    const maps = answer === this.mapped.answer ? this.mapped.maps : await this.decode(answer, scene);
    // Prepared before the former picture goes, so that the masks of a sequence do not flicker.
    await this.imageView.prepare(this.overlayOf(entry, scene, maps, filter, selected));
    if (this.wanted !== frame || entry.answer !== answer) return false;
    this.mapped = { answer, maps };
    if (this.shown !== frame) {
      const former = this.scene;
      this.scene = scene;
      this.shown = frame;
      this.cloudView?.setCloud(scene.cloud);
      this.imageView.setPictures(scene.pictures);
      this.arrange(entry);
      this.kind = answer ? boxKind(answer, layout.kind) : layout.kind;
      if (this.viewed !== this.kind) this.reset();
      if (former && !former.isKept) closePictures(former);
    }
    this.draw(entry, filter, selected);
    return true;
  }

  /** What the answer says of pixels and points, if it is the one that is shown. */
  mapsOf({ answer }: Entry): Maps {
    return answer === this.mapped.answer ? this.mapped.maps : NO_MAPS;
  }

  private async decode(answer: Answer | undefined, scene: Scene): Promise<Maps> {
    try {
      return await decodeMaps(answer);
    } catch (error) {
      scene.problems.push(`the map of the answer is not shown: ${describe(error)}; save the answer and look at it`);
      return NO_MAPS;
    }
  }

  /** Draw what was found, as far as the filter shows it. */
  draw(entry: Entry, filter: Filter, selected: Detection | null): void {
    if (!this.scene || entry.frame !== this.shown) return;
    if (entry.answer) this.kind = boxKind(entry.answer, this.expected);
    this.arrange(entry);
    const detections = entry.detections.filter((each) => isShown(each, filter));
    const toCamera = this.kind === "Camera" && this.scene.cloud ? this.scene.calibration?.toCamera("") : null;
    this.cloudView?.setDetections(detections, this.kind, selected, toCamera ? invertRigid(toCamera) : null);
    this.imageView.setOverlay(this.overlayOf(entry, this.scene, this.mapsOf(entry), filter, selected));
    const { cloud } = this.scene;
    // A cloud of a sequence may lack what the others have.
    const what = this.colours().includes(this.what) ? this.what : "height";
    if (cloud && what === "class") {
      const { pointLabels } = this.mapsOf(entry);
      const isSegmented = pointLabels !== null && pointLabels.length === cloud.count;
      this.cloudView?.setPointLabels(
        isSegmented
          ? keepShown(pointLabels, entry.answer?.classes ?? [], filter.hidden)
          : labelByBoxes(cloud, detections, this.kind),
      );
    }
    this.cloudView?.colourBy(what);
  }

  private overlayOf(entry: Entry, scene: Scene, maps: Maps, filter: Filter, selected: Detection | null): Overlay {
    return {
      detections: entry.detections.filter((each) => isShown(each, filter)),
      selected,
      kind: entry.answer ? boxKind(entry.answer, this.expected) : this.expected,
      calibration: scene.calibration,
      segments: maps.segments,
      hidden: filter.hidden,
    };
  }

  colourBy(what: ColourBy): void {
    this.what = what;
  }

  /** Colours that the shown cloud has. */
  colours(): ColourBy[] {
    const cloud = this.scene?.cloud;
    return ["height", ...(cloud?.intensity ? ["intensity" as const] : []), "class", ...(cloud?.colours ? ["rgb" as const] : [])];
  }

  reset(): void {
    this.viewed = this.kind;
    this.cloudView?.reset(this.kind);
    this.imageView.reset();
  }

  top(): void {
    this.cloudView?.top(this.kind);
  }

  follow(from: Detection, to: Detection): void {
    if (from.box3d && to.box3d) this.cloudView?.follow(from, to);
  }

  /** Cloud and images side by side, or one above the other, if both are there. */
  private arrange(entry: Entry): void {
    const hasCloud = this.scene!.cloud !== null || entry.detections.some((each) => each.box3d);
    const aspects = this.scene!.pictures.map(({ bitmap }) => bitmap.width / bitmap.height);
    // Wide images have their place above the cloud, others beside it.
    this.root.dataset.images = aspects.length < 4 && aspects.every((aspect) => aspect > 2) ? "wide" : "";
    this.root.dataset.views = [hasCloud ? "cloud" : "", this.scene!.pictures.length ? "images" : ""].join(" ").trim();
  }

  private sceneOf(frame: Frame, layout: Layout): Promise<Scene> {
    let found = this.scenes.get(frame);
    if (!found) {
      found = readScene(frame, layout);
      this.scenes.set(frame, found);
      for (const old of this.scenes.keys()) {
        if (this.scenes.size <= KEPT) break;
        if (old !== frame && old !== this.shown) this.drop(old);
      }
    }
    return found;
  }

  private drop(frame: Frame): void {
    void this.scenes.get(frame)?.then((scene) => {
      scene.isKept = false;
      if (scene !== this.scene) closePictures(scene);
    });
    this.scenes.delete(frame);
  }
}

function closePictures({ pictures }: Scene): void {
  for (const { bitmap } of pictures) bitmap.close();
}

async function readScene(frame: Frame, layout: Layout): Promise<Scene> {
  const scene: Scene = { cloud: null, pictures: [], calibration: null, problems: [], isKept: true };
  for (const [name, file] of frame.parts) {
    try {
      if (name === "points" || (name === "data" && !file.name.includes("."))) scene.cloud = await readCloud(file, layout);
      else if (name === "calibration") scene.calibration = parseCalibration(await file.text(), frame.parts.has("image"));
      else if (name === "image" || name.startsWith("image.")) {
        scene.pictures.push({ camera: name.slice(6), bitmap: await decodePicture(file) });
      }
    } catch (error) {
      scene.problems.push(`${file.name} is not ${name === "calibration" ? "used here" : "shown"}: ${describe(error)}`);
    }
  }
  return scene;
}
