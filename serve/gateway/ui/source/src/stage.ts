/** Shows a frame: its cloud, its images, and what was found in it. */

import { decodeImage } from "./api";
import { Calibration, parseCalibration } from "./calibration";
import { CloudView } from "./cloud_view";
import { Cloud } from "./clouds/cloud";
import { Layout, readCloud } from "./clouds/read";
import { boxKind, Detection, Filter, isShown } from "./detections";
import { Frame } from "./frames";
import { ImageView, Picture } from "./image_view";
import { invertRigid } from "./geometry";
import { BoxKind, describe } from "./model";
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
  private wanted: Frame | null = null;
  private what: ColourBy = "height";

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

  /** Decode the frame unless it is kept, and draw it. Returns false if another one was asked for meanwhile. */
  async show(entry: Entry, layout: Layout, filter: Filter, selected: Detection | null): Promise<boolean> {
    const { frame } = entry;
    this.wanted = frame;
    const scene = await this.sceneOf(frame, layout);
    if (this.wanted !== frame) return false;
    if (this.shown !== frame) {
      const isFirst = this.shown === null;
      const former = this.scene;
      this.scene = scene;
      this.shown = frame;
      this.cloudView?.setCloud(scene.cloud);
      this.imageView.setPictures(scene.pictures);
      this.arrange(entry);
      if (isFirst) this.cloudView?.reset(this.kind);
      if (former && !former.isKept) closePictures(former);
    }
    this.draw(entry, filter, selected);
    return true;
  }

  /** Draw what was found, as far as the filter shows it. */
  draw(entry: Entry, filter: Filter, selected: Detection | null): void {
    if (!this.scene || entry.frame !== this.shown) return;
    if (entry.answer) this.kind = boxKind(entry.answer);
    this.arrange(entry);
    const detections = entry.detections.filter((each) => isShown(each, filter));
    const toCamera = this.kind === "Camera" && this.scene.cloud ? this.scene.calibration?.toCamera("") : null;
    this.cloudView?.setDetections(detections, this.kind, selected, toCamera ? invertRigid(toCamera) : null);
    this.imageView.setOverlay({
      detections,
      selected,
      kind: this.kind,
      calibration: this.scene.calibration,
      segments: entry.segments ?? null,
      hidden: filter.hidden,
    });
    const { cloud } = this.scene;
    // A cloud of a sequence may lack what the others have.
    const what = this.colours().includes(this.what) ? this.what : "height";
    if (cloud && what === "class") {
      const { pointLabels, answer } = entry;
      const isSegmented = pointLabels?.length === cloud.count;
      this.cloudView?.setPointLabels(
        isSegmented
          ? keepShown(pointLabels, answer?.classes ?? [], filter.hidden)
          : labelByBoxes(cloud, detections, this.kind),
      );
    }
    this.cloudView?.colourBy(what);
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
      scene.problems.push(`${file.name} is not shown: ${describe(error)}`);
    }
  }
  return scene;
}

async function decodePicture(file: File): Promise<ImageBitmap> {
  try {
    return await createImageBitmap(file);
  } catch {
    return createImageBitmap(await decodeImage(file));
  }
}
