/**
 * Builds the guest's initramfs: two archives in one file. The base holds what seldom changes (busybox, tools, modules,
 * the Node that runs this, the package's dependencies) and is kept in the cache; the second one holds the built
 * package and the init script, and is written for each run. Everything is uncompressed: copying is faster than
 * unpacking in an emulated machine.
 */
import { createHash } from 'node:crypto';
import { createReadStream, createWriteStream, type Dirent, existsSync } from 'node:fs';
import { readdir, readFile, stat } from 'node:fs/promises';
import { basename, join, relative, resolve } from 'node:path';
import { pipeline } from 'node:stream/promises';
import { entry } from '../fetch/cache.ts';
import type { Components } from '../fetch/components.ts';
import { programIn } from '../fetch/sysroot.ts';
import { run } from '../host/process.ts';
import { GUEST_MODULES, GUEST_TOOLS } from './contents.ts';
import { CpioWriter } from './cpio.ts';
import { collectModules } from './modules.ts';

/** Raise it when what the base holds changes in a way that its inputs do not show. */
const BASE_VERSION = 2;
const APP = 'app';
const TOOLS = 'opt/tools';

export interface ImageOptions {
  readonly components: Components;
  readonly cache: string;
  /** Folder of package.json and node_modules. */
  readonly packageRoot: string;
  /** Folder of the built package, inside `packageRoot`. */
  readonly dist: string;
  /** Where to write the image. */
  readonly output: string;
}

export async function buildImage(options: ImageOptions): Promise<void> {
  const { components, cache, packageRoot, dist, output } = options;
  const dependencies = await productionDependencies(packageRoot);
  const name = `base-${await fingerprint(components, dependencies)}`;
  const base = await entry(cache, name, (folder) =>
    buildBase(components, packageRoot, dependencies, join(folder, 'base.cpio')),
  );
  await pipeline(createReadStream(join(base, 'base.cpio'), { highWaterMark: 1 << 20 }), createWriteStream(output));
  const archive = new CpioWriter(createWriteStream(output, { flags: 'a' }));
  await archive.copy('init', join(packageRoot, 'qemu-test/image/init.sh'), 0o755);
  await archive.copy(join(APP, 'package.json'), join(packageRoot, 'package.json'));
  await addTree(archive, dist, join(APP, relative(packageRoot, dist)), (path) => path.endsWith('.js'));
  await archive.end();
}

async function buildBase(
  components: Components,
  packageRoot: string,
  dependencies: readonly string[],
  output: string,
): Promise<void> {
  const archive = new CpioWriter(createWriteStream(output));
  for (const folder of ['proc', 'sys', 'dev', 'tmp', 'run', 'root', 'etc']) await archive.folder(folder);
  await addCommands(archive, components);
  await addModules(archive, components);
  await addNode(archive, dependencies);
  for (const folder of dependencies) {
    await addTree(archive, folder, join(APP, relative(packageRoot, folder)), isNeededAtRunTime);
  }
  await archive.end();
}

async function addCommands(archive: CpioWriter, { busybox, tools }: Components): Promise<void> {
  await addTree(archive, tools, TOOLS, (path) => !/^(?:usr\/share|var|etc)\//.test(path));
  for (const [name, candidates] of Object.entries(GUEST_TOOLS)) {
    const program = candidates.find((path) => existsSync(join(tools, path)));
    if (program === undefined) throw new Error(`${tools} holds no ${name}`);
    const { command, args } = programIn(tools, program, `/${TOOLS}`);
    await archive.file(join('usr/sbin', name), `#!/bin/sh\nexec ${[command, ...args].join(' ')} "$@"\n`, 0o755);
  }
  // This shell prefers its own applets to what PATH finds, but not to its functions.
  const functions = Object.keys(GUEST_TOOLS).map((name) => `${name}() { /usr/sbin/${name} "$@"; }\n`);
  await archive.file('etc/shrc', functions.join(''));
  await archive.copy('bin/busybox', busybox, 0o755);
  for (const applet of (await run(busybox, ['--list'])).split('\n')) {
    if (applet !== '' && applet !== 'busybox') await archive.link(join('bin', applet), 'busybox');
  }
  await archive.link('sbin/modprobe', '../bin/busybox');
}

async function addModules(archive: CpioWriter, { modules: folder, release, busybox }: Components): Promise<void> {
  const { modules, dependencies, aliases } = await collectModules(folder, GUEST_MODULES, busybox);
  const home = join('lib/modules', release);
  for (const module of modules) await archive.file(join(home, module.path), module.content);
  await archive.file(join(home, 'modules.dep'), dependencies);
  await archive.file(join(home, 'modules.alias'), aliases);
}

/** Node itself, and the libraries that it and the native modules are linked with, at the paths they have here. */
async function addNode(archive: CpioWriter, dependencies: readonly string[]): Promise<void> {
  await archive.copy('usr/bin/node', process.execPath, 0o755);
  const programs = [process.execPath];
  for (const folder of dependencies) {
    for (const path of await readdir(folder, { recursive: true })) {
      if (path.endsWith('.node') && isNeededAtRunTime(path)) programs.push(join(folder, path));
    }
  }
  for (const program of programs) {
    for (const library of (await run('ldd', [program])).matchAll(/(?:=>\s*|^\s*)(\/\S+)\s+\(0x/gm)) {
      await archive.copy(library[1].slice(1), library[1], 0o755);
    }
  }
}

async function addTree(
  archive: CpioWriter,
  from: string,
  to: string,
  wanted: (path: string) => boolean,
): Promise<void> {
  for (const item of await readdir(from, { recursive: true, withFileTypes: true })) {
    const source = join(item.parentPath, item.name);
    const path = relative(from, source);
    if (wanted(path)) await addItem(archive, item, source, join(to, path));
  }
}

async function addItem(archive: CpioWriter, item: Dirent, source: string, path: string): Promise<void> {
  if (item.isFile()) return archive.copy(path, source);
  if (!item.isSymbolicLink()) return;
  const target = await stat(source).catch(() => undefined);
  if (target?.isFile() === true) await archive.copy(path, source);
}

/** Folders of the packages that `packageRoot` needs at run time, as npm laid them out, those for this platform only. */
async function productionDependencies(packageRoot: string): Promise<string[]> {
  const folders = new Set<string>();
  const visit = async (folder: string): Promise<void> => {
    const description: unknown = JSON.parse(await readFile(join(folder, 'package.json'), 'utf8'));
    for (const name of dependencyNames(description)) {
      const home = findPackage(name, folder, packageRoot);
      if (home === undefined || folders.has(home)) continue;
      folders.add(home);
      await visit(home);
    }
  };
  await visit(packageRoot);
  return [...folders].sort();
}

function dependencyNames(description: unknown): string[] {
  const names: string[] = [];
  if (typeof description !== 'object' || description === null) return names;
  for (const [field, value] of Object.entries(description)) {
    const counts = field === 'dependencies' || field === 'optionalDependencies';
    if (counts && typeof value === 'object' && value !== null) names.push(...Object.keys(value));
  }
  return names;
}

/** Looks a package up as Node does: in the node_modules of `from` and of the folders above it. Absent: optional. */
function findPackage(name: string, from: string, packageRoot: string): string | undefined {
  for (let folder = from; ; folder = resolve(folder, '..')) {
    const candidate = join(folder, 'node_modules', name);
    if (existsSync(join(candidate, 'package.json'))) return candidate;
    if (folder === packageRoot) return undefined;
  }
}

/** Leaves out sources, documentation, type declarations and native modules for another C library. */
function isNeededAtRunTime(path: string): boolean {
  if (path.includes('musl') || /(?:^|\/)(?:doc|vendor)\//.test(path)) return false;
  return /\.(?:js|cjs|mjs|json|node)$/.test(path) && basename(path) !== 'package-lock.json';
}

async function fingerprint(components: Components, dependencies: readonly string[]): Promise<string> {
  const hash = createHash('sha256').update(
    JSON.stringify([BASE_VERSION, GUEST_MODULES, components.release, process.version]),
  );
  for (const path of [
    process.execPath,
    components.busybox,
    components.tools,
    ...dependencies.map((d) => join(d, 'package.json')),
  ]) {
    const { size, mtimeMs } = await stat(path);
    hash.update(`${path} ${size} ${mtimeMs}\n`);
  }
  return hash.digest('hex').slice(0, 16);
}
