/** What an image is written through: a path has no leading slash; the folders above it are made; of two files with one path the first one counts. */
export interface Archive {
  folder(path: string): Promise<void>;
  file(path: string, content: string | Uint8Array, mode?: number): Promise<void>;
  /** Adds the file `source` of this machine (a link is followed). */
  copy(path: string, source: string, mode?: number): Promise<void>;
  link(path: string, target: string): Promise<void>;
  /** Writes what is left to write; nothing can be added after it. */
  end(): Promise<void>;
}

/** The folder that holds `path`; that of the uppermost folder is ''. */
export function parentOf(path: string): string {
  const slash = path.lastIndexOf('/');
  return slash < 0 ? '' : path.slice(0, slash);
}
