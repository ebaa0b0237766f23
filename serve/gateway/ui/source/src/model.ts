/** Types of the server's answers (docs/answers.md, docs/gateway.md), as far as the page reads them. */

export interface Model {
  name: string;
  version: string;
  default: boolean;
  status: "ready" | "loading" | "refused";
  workers: { ready: number; all: number };
  waiting?: number;
  running?: number;
  reason?: string;
  modality?: string;
  parts?: string[];
  load_dim?: number | null;
  columns?: string[];
  box_type_3d?: string | null;
  classes?: string[];
  warnings?: Notice[];
}

export interface Notice {
  code: string;
  message: string;
}

/** Run lengths of a mask as COCO writes them: column by column, beginning with zeros. */
export interface RunLengths {
  size: [number, number];
  counts: string | number[];
}

export interface Answer {
  bboxes_3d?: number[][];
  scores_3d?: number[];
  labels_3d?: number[];
  bboxes?: number[][];
  scores?: number[];
  labels?: number[];
  names?: string[];
  /** Ids over a track session, -1 for a detection without a track. */
  track_ids?: number[];
  box_type_3d?: string;
  masks?: RunLengths[];
  classes?: string[];
  pts_semantic_mask?: { dtype: string; shape: number[]; b64: string };
  panoptic_seg?: { size: [number, number]; png_b64: string };
  segments_info?: Segment[];
  warnings?: Notice[];
  model?: unknown;
}

export interface Segment {
  id: number;
  category_id: number;
  name: string;
  area: number;
  bbox: [number, number, number, number];
}

/** How long the stages of a request took, milliseconds; `total` as the page saw it. */
export type Timing = Record<string, number>;

export type BoxKind = "LiDAR" | "Camera" | "Depth";

/** Raised for whatever the page reports to its user, in a sentence. */
export class PageError extends Error {
  constructor(
    message: string,
    readonly code = "",
    readonly status = 0,
    readonly requestId = "",
    /** After how many seconds the server may be asked again (Retry-After). */
    readonly retryAfter = 0,
  ) {
    super(message);
  }
}

/** What a browser says of a file that it cannot read, or can no longer. */
const UNREADABLE = ["NotReadableError", "NotFoundError", "SecurityError"];

export function describe(error: unknown): string {
  if (error instanceof DOMException && UNREADABLE.includes(error.name)) {
    return "the file cannot be read: it was changed, moved or locked after it was opened; open it again";
  }
  if (!(error instanceof PageError)) return error instanceof Error ? error.message : String(error);
  const where = [error.status || "", error.code].filter(Boolean).join(" ");
  const request = error.requestId ? ` (request ${error.requestId})` : "";
  return `${where ? `${where}: ` : ""}${error.message}${request}`;
}
