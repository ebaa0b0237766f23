/**
 * A file to a cloud: by its first bytes, as the server does it (serve/protocol/points.py). .bin, .npy, PCD and PLY are
 * read here; the others, and what a reader here does not understand, by the server.
 */

import { decodePoints } from "../api";
import { Model, PageError } from "../model";
import { arrange, Cloud, usualColumns } from "./cloud";
import { readPcd, readPly } from "./loaders";
import { readNpy } from "./npy";

/** What the numbers of a file without names mean. */
export interface Layout {
  width: number;
  columns(width: number): string[];
}

/** Columns as the user declares them (`x,y,z,ring` with `name=value` for those that the file lacks), else the model's. */
export function layoutOf(model: Model | null, declared: string): Layout {
  const named = declared
    .split(",")
    .map((word) => word.trim())
    .filter((word) => word && !word.includes("="));
  const isDepth = model?.modality === "depth" || model?.box_type_3d === "Depth";
  const width = named.length || model?.columns?.length || model?.load_dim || 4;
  return {
    width,
    columns: (found) => {
      if (named.length === found) return named;
      return model?.columns?.length === found ? model.columns : usualColumns(found, isDepth);
    },
  };
}

export async function readCloud(file: File, layout: Layout): Promise<Cloud> {
  const buffer = await file.arrayBuffer();
  const kind = sniff(new Uint8Array(buffer, 0, Math.min(buffer.byteLength, 4096)));
  try {
    if (kind === "bin") return readBin(buffer, layout);
    if (kind === "npy") return readNpy(buffer, layout.columns);
    if (kind === "pcd") return named(readPcd(buffer));
    if (kind === "ply") return named(readPly(buffer));
  } catch (error) {
    if (kind === "bin") throw error;
  }
  const { columns, values } = await decodePoints(file);
  const width = columns.length;
  const names = columns[0] === "0" ? layout.columns(width) : columns;
  return arrange(values.length / width, names, (row, column) => values[row * width + column]);
}

function sniff(head: Uint8Array): "npy" | "pcd" | "ply" | "server" | "bin" {
  const text = String.fromCharCode(...head.subarray(0, 512));
  if (text.startsWith("\x93NUMPY")) return "npy";
  if (/^(# \.PCD|VERSION|FIELDS)/.test(text)) return "pcd";
  if (/^ply[\r\n]/.test(text)) return "ply";
  if (/^(LASF|PK\x03\x04|PK\x05\x06)/.test(text)) return "server";
  return "bin";
}

function readBin(buffer: ArrayBuffer, { width, columns }: Layout): Cloud {
  if (buffer.byteLength % (4 * width)) {
    throw new PageError(
      `${buffer.byteLength} bytes are not points of ${width} numbers; name the file's columns under Options`,
    );
  }
  const values = new Float32Array(buffer);
  return arrange(values.length / width, columns(width), (row, column) => values[row * width + column]);
}

/** A loader that finds no point has not understood the file. */
function named(cloud: Cloud): Cloud {
  if (!cloud.count) throw new PageError("the cloud has no point");
  return cloud;
}
