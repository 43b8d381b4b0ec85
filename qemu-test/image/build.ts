/**
 * Builds what a guest boots with. A read-only file system holds what seldom changes (tools, modules, the Node that runs this, the
 * package's dependencies) and is kept in the cache; the guest reads of it what it needs. An initramfs, which is copied whole and so is small, holds
 * busybox and the links into that file system, cached too, and what is written for each run: the built package and the init script.
 */
import { createHash } from 'node:crypto';
import { createWriteStream, type Dirent, existsSync } from 'node:fs';
import { copyFile, readdir, readFile, stat } from 'node:fs/promises';
import { basename, dirname, join, relative, resolve } from 'node:path';
import { entry, removeUnused } from '../fetch/cache.ts';
import type { Components } from '../fetch/components.ts';
import { programIn } from '../fetch/sysroot.ts';
import { run } from '../host/process.ts';
import type { Archive } from './archive.ts';
import { bundlePrograms } from './bundle.ts';
import { FILE_SYSTEM_MODULE, GUEST_MODULES, GUEST_TOOLS } from './contents.ts';
import { CpioWriter } from './cpio.ts';
import { ErofsWriter } from './erofs.ts';
import { collectModules } from './modules.ts';

/** Raise it when what the base holds changes in a way that its inputs do not show. */
const BASE_VERSION = 3;
const BASE_FILE = 'base.erofs';
const LINKS_FILE = 'links.cpio';
/** Bases that are kept: one for each state of the dependencies that was used last. */
const BASES_KEPT = 3;
/** Where the guest mounts the base, and what of it. */
const BASE = '/base';
const APP = 'app';
const TOOLS = 'opt/tools';
const MODULES = 'lib/modules';
const NODE = 'usr/bin/node';
/** Modules that init loads before there is a base, in this order. */
const EARLY_MODULES = 'early';

export interface ImageOptions {
  readonly components: Components;
  readonly cache: string;
  /** Folder of package.json and node_modules. */
  readonly packageRoot: string;
  /** Folder of the built package, inside `packageRoot`. */
  readonly dist: string;
  /** Where to write what is made for each run. */
  readonly scratch: string;
}

/** Files to boot from. */
export interface GuestImage {
  readonly initramfs: string;
  readonly base: string;
}

export async function buildImage(options: ImageOptions): Promise<GuestImage> {
  const { components, cache, packageRoot, dist, scratch } = options;
  const dependencies = await productionDependencies(packageRoot);
  const name = `base-${await fingerprint(components, dependencies)}`;
  const base = await entry(cache, name, (folder) => buildBase(components, packageRoot, dependencies, folder));
  await removeUnused(cache, name, BASES_KEPT);
  const initramfs = join(scratch, 'initramfs.cpio');
  const programs = join(scratch, 'programs');
  const guestDist = join(APP, relative(packageRoot, dist));
  await bundlePrograms(dist, programs, join('/', guestDist));
  await copyFile(join(base, LINKS_FILE), initramfs);
  const archive = new CpioWriter(createWriteStream(initramfs, { flags: 'a' }));
  await archive.copy('init', join(packageRoot, 'qemu-test/image/init.sh'), 0o755);
  await archive.copy(join(APP, 'package.json'), join(packageRoot, 'package.json'));
  await addTree(archive, programs, guestDist, () => true);
  await archive.end();
  return { initramfs, base: join(base, BASE_FILE) };
}

async function buildBase(
  components: Components,
  packageRoot: string,
  dependencies: readonly string[],
  output: string,
): Promise<void> {
  const base = await ErofsWriter.create(join(output, BASE_FILE));
  const links = new CpioWriter(createWriteStream(join(output, LINKS_FILE)));
  const link = (path: string) => links.link(path, join(BASE, path));
  for (const folder of ['proc', 'sys', 'dev', 'tmp', 'run', 'root', 'etc', BASE.slice(1)]) await links.folder(folder);
  await addCommands(base, links, components);
  await addModules(base, links, components);
  await link(MODULES);
  for (const folder of await addNode(base, dependencies)) await link(folder);
  await link(NODE);
  for (const folder of dependencies) {
    await addTree(base, folder, join(APP, relative(packageRoot, folder)), isNeededAtRunTime);
  }
  await link(join(APP, 'node_modules'));
  await base.end();
  await links.end();
}

async function addCommands(base: Archive, links: Archive, { busybox, tools }: Components): Promise<void> {
  await addTree(base, tools, TOOLS, (path) => !/^(?:usr\/share|var|etc)\//.test(path));
  for (const [name, candidates] of Object.entries(GUEST_TOOLS)) {
    const program = candidates.find((path) => existsSync(join(tools, path)));
    if (program === undefined) throw new Error(`${tools} holds no ${name}`);
    const { command, args } = programIn(tools, program, join(BASE, TOOLS));
    await links.file(join('usr/sbin', name), `#!/bin/sh\nexec ${[command, ...args].join(' ')} "$@"\n`, 0o755);
  }
  // This shell prefers its own applets to what PATH finds, but not to its functions.
  const functions = Object.keys(GUEST_TOOLS).map((name) => `${name}() { /usr/sbin/${name} "$@"; }\n`);
  await links.file('etc/shrc', functions.join(''));
  await links.copy('bin/busybox', busybox, 0o755);
  for (const applet of (await run(busybox, ['--list'])).split('\n')) {
    if (applet !== '' && applet !== 'busybox') await links.link(join('bin', applet), 'busybox');
  }
  await links.link('sbin/modprobe', '../bin/busybox');
}

async function addModules(base: Archive, links: Archive, components: Components): Promise<void> {
  const { modules: folder, release, busybox } = components;
  const { modules, dependencies, aliases } = await collectModules(folder, GUEST_MODULES, busybox);
  const home = join(MODULES, release);
  for (const module of modules) await base.file(join(home, module.path), module.content);
  await base.file(join(home, 'modules.dep'), dependencies);
  await base.file(join(home, 'modules.alias'), aliases);
  const early = await collectModules(folder, [FILE_SYSTEM_MODULE], busybox);
  // What one needs comes after it.
  for (const [i, { name, content }] of [...early.modules].reverse().entries()) {
    await links.file(join(EARLY_MODULES, `${i}-${name}.ko`), content);
  }
}

/**
 * Node itself, and the libraries that it and the native modules are linked with, at the paths they have here. Returns the folders of the
 * libraries.
 */
async function addNode(base: Archive, dependencies: readonly string[]): Promise<ReadonlySet<string>> {
  await base.copy(NODE, process.execPath, 0o755);
  const programs = [process.execPath];
  for (const folder of dependencies) {
    for (const path of await readdir(folder, { recursive: true })) {
      if (path.endsWith('.node') && isNeededAtRunTime(path)) programs.push(join(folder, path));
    }
  }
  const folders = new Set<string>();
  for (const program of programs) {
    for (const [, library] of (await run('ldd', [program])).matchAll(/(?:=>\s*|^\s*)\/(\S+)\s+\(0x/gm)) {
      await base.copy(library, `/${library}`, 0o755);
      folders.add(dirname(library));
    }
  }
  return folders;
}

async function addTree(archive: Archive, from: string, to: string, wanted: (path: string) => boolean): Promise<void> {
  for (const item of await readdir(from, { recursive: true, withFileTypes: true })) {
    const source = join(item.parentPath, item.name);
    const path = relative(from, source);
    if (wanted(path)) await addItem(archive, item, source, join(to, path));
  }
}

async function addItem(archive: Archive, item: Dirent, source: string, path: string): Promise<void> {
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
