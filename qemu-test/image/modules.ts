/**
 * Kernel modules for the guest: the ones asked for and all they depend on, with the `modules.dep` and `modules.alias`
 * that modprobe reads. Debian's package has neither (depmod writes them when it is installed), so they are made from
 * what each module says about itself in its `.modinfo` section: `depends=`, `softdep=`, `alias=`.
 */
import { readdir, readFile } from 'node:fs/promises';
import { basename, join, relative } from 'node:path';
import { run } from '../host/process.ts';

export interface KernelModule {
  readonly name: string;
  /** Path below `/lib/modules/RELEASE`, uncompressed: `kernel/net/ipv4/esp4.ko`. */
  readonly path: string;
  readonly content: Uint8Array;
  readonly depends: readonly string[];
  readonly aliases: readonly string[];
}

export interface ModuleSet {
  readonly modules: readonly KernelModule[];
  readonly dependencies: string;
  readonly aliases: string;
}

/** Reads `wanted` and what they need from the folder of a kernel release. A name the kernel has built in is skipped. */
export async function collectModules(folder: string, wanted: readonly string[], busybox: string): Promise<ModuleSet> {
  const files = new Map<string, string>();
  for (const path of await readdir(folder, { recursive: true })) {
    const match = /([^/]+)\.ko(?:\.(?:xz|gz|zst))?$/.exec(path);
    if (match !== null) files.set(canonical(match[1]), join(folder, path));
  }
  const builtin = await readFile(join(folder, 'modules.builtin'), 'utf8');
  const present = new Set(builtin.split('\n').map((line) => canonical(basename(line, '.ko'))));
  const found = new Map<string, KernelModule>();
  const visit = async (name: string, neededBy: string): Promise<void> => {
    if (found.has(name) || present.has(name)) return;
    const file = files.get(name);
    if (file === undefined) throw new Error(`the kernel has no module ${name}, which ${neededBy} needs`);
    const content = await readModule(file, busybox);
    const { depends: needed, before, aliases } = moduleInformation(content);
    // What is only to come before it may be missing: the kernel may have it built in under another name.
    const depends = [...needed, ...before.filter((other) => files.has(other))];
    const path = relative(folder, file).replace(/\.ko\..*$/, '.ko');
    const module: KernelModule = { name, path, content, depends, aliases };
    found.set(name, module);
    for (const dependency of depends) await visit(dependency, name);
  };
  for (const name of wanted) await visit(canonical(name), 'the guest');
  const modules = [...found.values()];
  return { modules, dependencies: dependencyFile(found), aliases: aliasFile(modules) };
}

/** What a module's `.modinfo` says. Every string there is `name=value` and ends with a zero byte. */
export function moduleInformation(content: Uint8Array): { depends: string[]; before: string[]; aliases: string[] } {
  const bytes = Buffer.from(content.buffer, content.byteOffset, content.length);
  const list = (text: string, separator: RegExp) => text.split(separator).filter((name) => name !== '');
  const depends = values(bytes, 'depends').flatMap((text) => list(text, /,/));
  const before = values(bytes, 'softdep')
    .flatMap((text) => list(/(?:^|\s)pre:\s*([^:]*?)(?:\s+post:|$)/.exec(text)?.[1] ?? '', /\s+/))
    .filter((name) => !/[*?]/.test(name));
  return { depends: unique(depends), before: unique(before), aliases: values(bytes, 'alias') };
}

const unique = (names: readonly string[]) => [...new Set(names.map(canonical))];

function values(bytes: Buffer, name: string): string[] {
  const found: string[] = [];
  const key = Buffer.from(`\0${name}=`);
  for (let at = bytes.indexOf(key); at >= 0; at = bytes.indexOf(key, at + 1)) {
    const start = at + key.length;
    const end = bytes.indexOf(0, start);
    if (end > start) found.push(bytes.toString('latin1', start, end));
  }
  return found;
}

/** `PATH: PATH...`: a module and all that must be loaded before it, the last one first. */
function dependencyFile(found: ReadonlyMap<string, KernelModule>): string {
  const lines: string[] = [];
  for (const module of found.values()) {
    const order: string[] = [];
    const visit = (name: string) => {
      const dependency = found.get(name);
      if (dependency === undefined || order.includes(dependency.path)) return;
      for (const next of dependency.depends) visit(next);
      order.push(dependency.path);
    };
    for (const name of module.depends) visit(name);
    lines.push(`${module.path}: ${order.reverse().join(' ')}`.trimEnd());
  }
  return `${lines.join('\n')}\n`;
}

function aliasFile(modules: readonly KernelModule[]): string {
  return modules.map((m) => m.aliases.map((alias) => `alias ${alias} ${m.name}\n`).join('')).join('');
}

async function readModule(file: string, busybox: string): Promise<Uint8Array> {
  const reader = { xz: 'xzcat', gz: 'zcat', zst: undefined, ko: '' }[file.slice(file.lastIndexOf('.') + 1)];
  if (reader === undefined) throw new Error(`${file} is compressed in a way that cannot be read here`);
  if (reader === '') return readFile(file);
  return Buffer.from(await run(busybox, [reader, file], { encoding: 'latin1' }), 'latin1');
}

/** Names of modules are compared with `_` for `-`. */
function canonical(name: string): string {
  return name.trim().replaceAll('-', '_');
}
