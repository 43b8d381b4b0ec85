/**
 * The folder that keeps what was fetched and built: `$VIPSEC_CACHE`, else `$XDG_CACHE_HOME/virtio-ipsec`, else
 * `~/.cache/virtio-ipsec`. An entry is a folder that appears whole (made under another name, then renamed); two runs
 * that want the same entry wait for one another.
 */
import { mkdir, open, readdir, readFile, rename, rm, stat, utimes } from 'node:fs/promises';
import { homedir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

const LOCK_POLL_MS = 200;
/** No run lasts longer. */
const RUN_MS = 3_600_000;

export function cacheFolder(environment: NodeJS.ProcessEnv = process.env): string {
  const { VIPSEC_CACHE: own, XDG_CACHE_HOME: shared } = environment;
  if (own !== undefined && own !== '') return own;
  const base = shared?.startsWith('/') ? shared : join(homedir(), '.cache');
  return join(base, 'virtio-ipsec');
}

export async function exists(path: string): Promise<boolean> {
  return stat(path).then(
    () => true,
    () => false,
  );
}

/**
 * Returns the folder of entry `name`, made by `make(folder)` if it is not there. When `make` fails nothing is left
 * behind; what it keeps elsewhere (a half-finished download) is its own business.
 */
export async function entry(
  cache: string,
  name: string,
  make: (folder: string) => Promise<void>,
  signal?: AbortSignal,
): Promise<string> {
  const folder = join(cache, name);
  if (await exists(folder)) return folder;
  await mkdir(cache, { recursive: true });
  const release = await lock(join(cache, `${name}.lock`), signal);
  const unfinished = `${folder}.unfinished`;
  try {
    if (await exists(folder)) return folder;
    await rm(unfinished, { recursive: true, force: true });
    await mkdir(unfinished);
    await make(unfinished);
    await rename(unfinished, folder);
  } finally {
    await rm(unfinished, { recursive: true, force: true });
    await release();
  }
  return folder;
}

/**
 * Notes that entry `name` is in use, and deletes all but the `keep` that were used last of the entries whose names begin as its own does, up to
 * the dash; and none that another run may still need.
 */
export async function removeUnused(cache: string, name: string, keep: number): Promise<void> {
  const now = new Date();
  await utimes(join(cache, name), now, now);
  const alike = new RegExp(`^${name.slice(0, name.indexOf('-') + 1)}[0-9a-f]+$`);
  const found: { path: string; used: number }[] = [];
  for (const other of await readdir(cache)) {
    const path = join(cache, other);
    if (alike.test(other)) found.push({ path, used: (await stat(path)).mtimeMs });
  }
  found.sort((a, b) => b.used - a.used);
  for (const { path, used } of found.slice(keep)) {
    if (used < now.getTime() - RUN_MS) await rm(path, { recursive: true, force: true });
  }
}

/** A file that names the process that holds the lock; one left by a process that is dead is taken over. */
async function lock(path: string, signal?: AbortSignal): Promise<() => Promise<void>> {
  for (;;) {
    signal?.throwIfAborted();
    try {
      const file = await open(path, 'wx');
      await file.writeFile(String(process.pid));
      await file.close();
      return () => rm(path, { force: true });
    } catch (error) {
      if (!(error instanceof Error && 'code' in error && error.code === 'EEXIST')) throw error;
    }
    const holder = Number(await readFile(path, 'utf8').catch(() => ''));
    if (holder > 0 && !isAlive(holder)) await rm(path, { force: true });
    else await sleep(LOCK_POLL_MS, undefined, signal === undefined ? {} : { signal });
  }
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return error instanceof Error && 'code' in error && error.code === 'EPERM';
  }
}
