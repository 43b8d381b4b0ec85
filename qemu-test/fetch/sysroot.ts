/**
 * A folder of unpacked Debian packages whose programs run from there: through the loader and the libraries that came
 * with them, not the system's, so that a program of a newer Debian runs on an older one.
 */
import { existsSync } from 'node:fs';
import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import { run } from '../host/process.ts';

export const LOADER = 'ld-linux-x86-64.so.2';
/** Both layouts: before and after the merge of `/lib` into `/usr/lib`. */
export const LIBRARY_FOLDERS = ['lib/x86_64-linux-gnu', 'usr/lib/x86_64-linux-gnu'] as const;
const UNUSED = ['usr/share/doc', 'usr/share/man', 'usr/share/locale', 'usr/share/info', 'usr/share/lintian'] as const;

/** How to start a program. */
export interface Program {
  readonly command: string;
  readonly args: readonly string[];
  readonly env?: Readonly<Record<string, string>>;
}

export async function unpack(archives: readonly string[], root: string): Promise<void> {
  for (const archive of archives) await run('dpkg-deb', ['-x', archive, root]);
  for (const folder of UNUSED) await rm(join(root, folder), { recursive: true, force: true });
}

/** The command that starts `program` (a path inside `root`) with the libraries of `root`; `seenFrom` is where `root` will be. */
export function programIn(root: string, program: string, seenFrom = root): Program {
  const home = LIBRARY_FOLDERS.find((folder) => existsSync(join(root, folder, LOADER)));
  if (home === undefined) throw new Error(`${root} holds no ${LOADER}`);
  const libraries = LIBRARY_FOLDERS.map((folder) => join(seenFrom, folder)).join(':');
  return { command: join(seenFrom, home, LOADER), args: ['--library-path', libraries, join(seenFrom, program)] };
}
