/** The page: wires panels, views and the server together. */

import { hasKey, setKey } from "./api";
import { CloudView } from "./cloud_view";
import { extentOf } from "./clouds/cloud";
import { Layout, layoutOf } from "./clouds/read";
import { continueDetection, Detection, isShown } from "./detections";
import { announce, byId, clearErrors, make, showError } from "./dom";
import { answersAsJson, save, viewsAsPng } from "./export";
import { FoundPanel } from "./found_panel";
import { FramesPanel } from "./frames_panel";
import { Dropped, filesOf, filesOfInput, listFrames } from "./frames";
import { ImageView } from "./image_view";
import { describe, Model } from "./model";
import { Player } from "./player";
import { ColourBy } from "./point_material";
import { ServerState } from "./server_state";
import { Entry, Session } from "./session";
import { Stage } from "./stage";

/** How far a detection may have moved from one frame to the next: metres, pixels. */
const REACH = { box3d: 4, box2d: 80 };

const session = new Session();
const found = new FoundPanel();
const framesPanel = new FramesPanel();
const player = new Player();
const server = new ServerState(byId("server-summary"), byId("server-models"));
const imageView = new ImageView(byId<HTMLCanvasElement>("images"));
const cloudView = makeCloudView();
const stage = new Stage(cloudView, imageView, byId("views"));
const modelChoice = byId<HTMLSelectElement>("model");
const colourChoice = byId<HTMLSelectElement>("colour-by");
let models: Model[] = [];
/** Whether the model was chosen by the user, or has answered a frame: only then it stays chosen when it goes. */
let isModelMeant = false;
let current: Entry | null = null;
let selected: Detection | null = null;
/** What was selected last, while frames pass in which it is not found; followed again where it is. */
let sought: Detection | null = null;

function makeCloudView(): CloudView | null {
  try {
    const made = new CloudView(byId<HTMLCanvasElement>("cloud"), byId<HTMLCanvasElement>("cloud-labels"));
    made.onContext = (isThere) => {
      if (isThere) clearErrors();
      else showError("The browser took the graphics card away (WebGL context lost), so that no cloud is drawn until it is back; reload the page if it does not come back.");
    };
    return made;
  } catch {
    showError("This browser has no WebGL: clouds are not drawn, detections and images are. Turn hardware acceleration on, or use another browser.");
    return null;
  }
}

function layout(): Layout {
  return layoutOf(session.model, session.options.columns ?? "");
}

/** Show a frame with what is known of it. */
async function show(entry: Entry): Promise<void> {
  if (entry !== current) {
    current = entry;
    selected = null;
    framesPanel.setCurrent(entry);
  }
  if (sought && !selected && entry.answer) continueFrom(sought, entry);
  if (!(await stage.show(entry, layout(), found.filter, selected)) || entry !== current) return;
  for (const option of colourChoice.options) option.disabled = !stage.colours().includes(option.value as ColourBy);
  refresh();
}

/** Select what continues a detection of another frame, if it is there; the camera moves with it if it follows. */
function continueFrom(former: Detection, entry: Entry): void {
  const found = continueDetection(former, entry.detections, former.box3d ? REACH.box3d : REACH.box2d);
  if (!found) return;
  selected = sought = found;
  if (byId<HTMLInputElement>("follow").checked) stage.follow(former, found);
}

function select(detection: Detection | null): void {
  selected = sought = detection;
}

/** Draw the present frame anew: another filter, selection or answer. */
function refresh(): void {
  if (!current) return;
  stage.draw(current, found.filter, selected);
  found.show(current, stage.mapsOf(current), infoOf(current), selected);
  const shown = current.detections.filter((each) => isShown(each, found.filter)).length;
  const count = stage.scene?.cloud?.count;
  const words = `${shown} detection${shown === 1 ? "" : "s"} shown`;
  byId("cloud").setAttribute("aria-label", `Point cloud ${current.frame.name}, ${count ?? 0} points, ${words}`);
  byId("images").setAttribute("aria-label", `Image ${current.frame.name}, ${words}`);
  byId<HTMLButtonElement>("export-json").disabled = !session.entries.some((entry) => entry.answer);
  byId<HTMLButtonElement>("export-png").disabled = false;
}

function infoOf(entry: Entry): string {
  const { scene } = stage;
  const lines = [entry.frame.name];
  if (scene?.cloud) {
    const { count } = scene.cloud;
    lines.push(`${count.toLocaleString("en")} points`, extentOf(scene.cloud) || (count ? "no point has numbers as coordinates" : "nothing to draw"));
  }
  for (const { camera, bitmap } of scene?.pictures ?? []) lines.push(`${camera} ${bitmap.width} × ${bitmap.height} pixels`.trim());
  if (entry.state === "failed") lines.push(entry.error ?? "");
  else if (entry.state !== "done") lines.push("waits for its answer …");
  if (entry.state !== "failed") lines.push(...(scene?.problems ?? []));
  if (entry.timing) {
    const { total, queue, inference } = entry.timing;
    const parts = [["queue", queue], ["inference", inference]].filter(([, value]) => value !== undefined);
    const details = parts.map(([stage, value]) => `${stage} ${(value as number).toFixed(1)} ms`).join(", ");
    lines.push(`answered in ${total.toFixed(0)} ms${details ? ` (${details})` : ""}`);
  }
  return lines.join("\n");
}

function take(dropped: Dropped[]): void {
  const { frames, leftOut } = listFrames(dropped);
  clearErrors();
  framesPanel.showLeftOut(leftOut);
  if (!frames.length) {
    const names = dropped.slice(0, 3).map(({ path }) => path).join(", ");
    return showError(`There is no frame among the ${dropped.length} files (${names || "an empty folder"}): open point clouds or images.`);
  }
  if (!session.model) showError("No model is ready: the frames are sent as soon as one is. The corner says what the server waits for.");
  stage.forget();
  stage.forgetView();
  session.setFrames(frames);
  framesPanel.show(session.entries);
  player.setCount(session.entries.length);
  current = selected = sought = null;
  announce(`${frames.length} frame${frames.length === 1 ? "" : "s"} opened`);
  void player.moveTo(0);
}

session.onChange = (entry) => {
  framesPanel.update(entry);
  framesPanel.showFailed(session.entries.filter(({ state }) => state === "failed").length);
  if (entry.state === "failed" && (entry === current || session.entries.length === 1)) showError(`${entry.frame.name}: ${entry.error}`);
  if (entry.state === "done") isModelMeant = true;
  if (entry === current) {
    void show(entry);
    if (entry.state === "done") announce(`${entry.frame.name}: ${entry.detections.length} detections`);
  }
};

player.onMove = (index) => show(session.entries[index]);
player.isReady = (index) => !["waiting", "running"].includes(session.entries[index].state);
framesPanel.onSendFailed = () => {
  clearErrors();
  session.sendFailed();
};
framesPanel.onChoose = (entry) => {
  player.pause();
  void player.moveTo(session.entries.indexOf(entry));
};
found.onFilter = refresh;
found.onSelect = (detection) => {
  select(detection === selected ? null : detection);
  refresh();
  if (selected) cloudView?.lookAt(selected);
};
for (const view of [cloudView, imageView]) {
  if (view) view.onPick = (detection) => {
    select(detection);
    refresh();
  };
}

server.onModels = (listed) => {
  models = listed;
  const ready = models.filter((model) => model.status === "ready");
  const names = ready.map(titleOf);
  session.model = ready.find((model) => session.model && titleOf(model) === titleOf(session.model)) ?? session.model;
  // A model that is meant stays chosen while it is not ready, or gone: nothing is sent to another one by itself.
  const isListed = session.model !== null && names.includes(titleOf(session.model));
  const chosen = isListed || isModelMeant ? session.model : (ready[0] ?? session.model);
  const isAway = chosen && !names.includes(titleOf(chosen));
  const texts = [...names, ...(isAway ? [`${titleOf(chosen)} (not ready)`] : [])];
  if (!chosen) texts.push("no model is ready");
  if (texts.join("\n") !== [...modelChoice.options].map((option) => option.text).join("\n")) {
    modelChoice.replaceChildren(...texts.map((text) => make("option", { value: text.replace(" (not ready)", "") }, text)));
    modelChoice.disabled = !chosen;
    if (chosen) modelChoice.value = titleOf(chosen);
  }
  if (chosen !== session.model) choose(chosen);
  byId("sample").hidden = !ready.some((model) => model.modality === "lidar");
  byId("key-form").hidden = !hasKey();
};
server.onKeyNeeded = () => {
  const isRefused = hasKey();
  byId("key-form").hidden = false;
  if (isRefused) showError("The server does not accept this API key: type another one, or ask its operator for one.");
  else announce("The server needs an API key");
};

function titleOf({ name, version }: Model): string {
  return `${name} ${version}`;
}

function choose(model: Model | null): void {
  session.model = model;
  if (!model || !session.entries.length) return;
  selected = sought = null;
  clearErrors();
  stage.forget();
  session.sendAll();
}

modelChoice.addEventListener("change", () => {
  isModelMeant = true;
  choose(models.find((model) => titleOf(model) === modelChoice.value) ?? session.model);
});
colourChoice.addEventListener("change", () => {
  stage.colourBy(colourChoice.value as ColourBy);
  refresh();
});
byId("point-size").addEventListener("input", (event) => cloudView?.setPointSize((event.target as HTMLInputElement).valueAsNumber));
byId("show-labels").addEventListener("change", (event) => {
  const { checked } = event.target as HTMLInputElement;
  if (cloudView) cloudView.showLabels = checked;
  imageView.showLabels = checked;
  refresh();
});
byId("server").addEventListener("toggle", () => void server.refresh());
byId("reset-view").addEventListener("click", () => stage.reset());
byId("top-view").addEventListener("click", () => stage.top());
byId("export-json").addEventListener("click", () => {
  const { entries, model } = session;
  save(answersAsJson(model, entries), entries.length === 1 ? `${entries[0].frame.name}.json` : "answers.json");
});
byId("export-png").addEventListener("click", async () => {
  try {
    save(await viewsAsPng(cloudView, imageView, byId("views")), `${current?.frame.name ?? "frame"}.png`);
  } catch (error) {
    showError(describe(error));
  }
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const field = byId<HTMLInputElement>("key");
  setKey(field.value);
  field.value = "";
  clearErrors();
  void server.refresh();
});
byId("options-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = new FormData(event.target as HTMLFormElement);
  session.options = Object.fromEntries([...given].map(([name, value]) => [name, String(value).trim()]));
  choose(session.model);
});
for (const [button, field] of [["choose-files", "files"], ["choose-folder", "folder"]]) {
  const input = byId<HTMLInputElement>(field);
  byId(button).addEventListener("click", () => input.click());
  input.addEventListener("change", () => {
    take(filesOfInput(input));
    input.value = "";
  });
}
byId("sample").addEventListener("click", async () => {
  const sample = await fetch(new URL("ui/assets/sample.bin", document.baseURI));
  if (sample.ok) take([{ path: "sample.bin", file: new File([await sample.blob()], "sample.bin") }]);
});
const views = byId("views");
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  views.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) views.classList.remove("dropping");
});
document.addEventListener("drop", async (event) => {
  event.preventDefault();
  views.classList.remove("dropping");
  try {
    if (event.dataTransfer) take(await filesOf(event.dataTransfer));
  } catch (error) {
    showError(`what was dropped cannot be read: ${describe(error)}`);
  }
});
byId("key-form").hidden = true;
void server.refresh();
