/**
 * What a run needs from Debian, and where it lies once fetched: the cloud kernel with its modules, busybox, the tools
 * that the guest uses, the stock QEMU (the system's own if it is new enough), and a QEMU that has vfio-user-pci.
 * Everything comes from the mirror that the system itself uses.
 */
import { readdir, readFile, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { run, ToolError } from '../host/process.ts';
import type { Progress } from '../host/progress.ts';
import { type AptEntry, PrivateApt } from './apt.ts';
import { entry } from './cache.ts';
import { type PackageSource, parseDeb822, parseOneLine, sourceOf } from './sources.ts';
import { type Program, programIn, unpack } from './sysroot.ts';

/** Netdev `stream` came with QEMU 7.2, vfio-user-pci with 10.1. */
const MINIMUM = { stock: [7, 2], vfioUser: [10, 1] } as const;
/** The oldest Debian whose backports carry a QEMU with vfio-user-pci. */
const VFIO_USER_RELEASE = 'trixie';
const ARCHIVE_KEYRING = '/usr/share/keyrings/debian-archive-keyring.gpg';
const QEMU = 'usr/bin/qemu-system-x86_64';

export type QemuKind = keyof typeof MINIMUM;

export interface Components {
  readonly kernel: string;
  /** Release of the kernel, as in `/lib/modules/RELEASE`. */
  readonly release: string;
  readonly modules: string;
  readonly busybox: string;
  /** Sysroot with `ip` and `ethtool`. */
  readonly tools: string;
  readonly qemu: Readonly<Record<QemuKind, Program>>;
}

export interface FetchOptions {
  readonly cache: string;
  readonly progress: Progress;
  readonly signal?: AbortSignal;
}

/** Fetches what is not there yet; all parts at the same time. */
export async function fetchComponents(options: FetchOptions): Promise<Components> {
  const [kernel, tools, stock, vfioUser] = await Promise.all([
    fetchPart('kernel', options, (debian) => ({
      suite: debian.codename,
      packages: ['linux-image-cloud-amd64', 'busybox-static'],
    })),
    fetchPart('tools', options, (debian) => ({
      suite: debian.codename,
      packages: ['iproute2', 'ethtool'],
      closure: true,
    })),
    qemu('stock', options, (debian) => debian.codename),
    qemu('vfioUser', options, () => `${VFIO_USER_RELEASE}-backports`),
  ]);
  const image = (await readdir(join(kernel, 'boot'))).find((name) => name.startsWith('vmlinuz-'));
  if (image === undefined) throw new ToolError(`${kernel} holds no kernel`, `delete ${kernel} and run this again`);
  const release = image.slice('vmlinuz-'.length);
  const modulesRoot = (await readdir(kernel)).includes('lib') ? 'lib' : 'usr/lib';
  return {
    kernel: join(kernel, 'boot', image),
    release,
    modules: join(kernel, modulesRoot, 'modules', release),
    busybox: await firstOf(kernel, ['bin/busybox', 'usr/bin/busybox']),
    tools,
    qemu: { stock, vfioUser },
  };
}

interface Debian {
  readonly codename: string;
  readonly sources: readonly PackageSource[];
}

interface Part {
  readonly suite: string;
  readonly packages: readonly string[];
  readonly closure?: boolean;
}

async function fetchPart(name: string, options: FetchOptions, part: (debian: Debian) => Part): Promise<string> {
  const { cache, progress, signal } = options;
  return entry(
    cache,
    name,
    async (folder) => {
      const debian = await readDebian();
      const { suite, packages, closure = false } = part(debian);
      const started = performance.now();
      // Kept when a download breaks off, so that the next run goes on from there.
      const workFolder = join(cache, `apt-${name}`);
      const apt = await PrivateApt.open(workFolder, entriesOf(suite, debian), {
        signal,
        onProgress: (state) => progress.update(name, state),
      });
      const wanted = await Promise.all(packages.map((p) => (p.startsWith('linux-image-') ? apt.dependency(p) : p)));
      const archives = await apt.download(wanted, closure, suite);
      progress.update(name, 'unpacking');
      await unpack(archives, folder);
      await rm(workFolder, { recursive: true, force: true });
      progress.finish(
        name,
        `fetched ${name} (${wanted.join(', ')}) in ${((performance.now() - started) / 1000).toFixed(1)} s`,
      );
    },
    signal,
  );
}

async function qemu(kind: QemuKind, options: FetchOptions, suite: (debian: Debian) => string): Promise<Program> {
  if (await systemQemuIsAtLeast(MINIMUM[kind])) return { command: 'qemu-system-x86_64', args: [] };
  const name = kind === 'stock' ? 'qemu-stock' : 'qemu-vfio-user';
  const root = await fetchPart(name, options, (debian) => ({
    suite: suite(debian),
    packages: ['qemu-system-x86'],
    closure: true,
  }));
  const { command, args } = programIn(root, QEMU);
  const firmware = ['usr/share/qemu', 'usr/share/seabios', 'usr/lib/ipxe/qemu'];
  return {
    command,
    args: [...args, ...firmware.flatMap((folder) => ['-L', join(root, folder)])],
    env: { QEMU_MODULE_DIR: join(root, 'usr/lib/x86_64-linux-gnu/qemu') },
  };
}

async function systemQemuIsAtLeast([major, minor]: readonly [number, number]): Promise<boolean> {
  const text = await run('qemu-system-x86_64', ['--version']).catch(() => '');
  const match = /version (\d+)\.(\d+)/.exec(text);
  if (match === null) return false;
  const [have, haveMinor] = [Number(match[1]), Number(match[2])];
  return have > major || (have === major && haveMinor >= minor);
}

/** Which Debian this is, and its sources. Refuses other systems with what to do there. */
async function readDebian(): Promise<Debian> {
  const hint = 'run it on Debian 12 or later for amd64, for instance in a container made from debian:12';
  const os = await readFile('/etc/os-release', 'utf8').catch(() => '');
  const field = (name: string) => new RegExp(`^${name}="?([^"\\n]*)"?$`, 'm').exec(os)?.[1];
  if (field('ID') !== 'debian') {
    throw new ToolError(`the guest is made from Debian packages, and this system is ${field('ID') ?? 'unknown'}`, hint);
  }
  const codename = field('VERSION_CODENAME');
  if (codename === undefined) throw new ToolError('this Debian has no code name (a testing or unstable system)', hint);
  if (process.arch !== 'x64')
    throw new ToolError(`the guest is an amd64 machine, and this one is ${process.arch}`, hint);
  const sources: PackageSource[] = [];
  const folder = '/etc/apt/sources.list.d';
  const more = (await readdir(folder).catch(() => [])).map((name) => join(folder, name));
  for (const path of ['/etc/apt/sources.list', ...more]) {
    if (path.endsWith('.list')) sources.push(...parseOneLine(await readFile(path, 'utf8').catch(() => '')));
    if (path.endsWith('.sources')) sources.push(...parseDeb822(await readFile(path, 'utf8').catch(() => '')));
  }
  if (sourceOf(codename, sources) === undefined) {
    throw new ToolError(
      `none of the sources in /etc/apt gives the packages of ${codename}`,
      'add a source line for the main archive of this Debian release',
    );
  }
  return { codename, sources };
}

/** The suites to read so that `suite` can be installed: a release alone, or backports on top of its release. */
function entriesOf(suite: string, debian: Debian): AptEntry[] {
  const base = suite.replace(/-backports$/, '');
  const main = sourceOf(debian.codename, debian.sources);
  if (main === undefined) return [];
  // A release other than the system's own is on the same mirror, and signed by keys that the archive keyring has.
  const source = base === debian.codename ? main : { ...main, signedBy: ARCHIVE_KEYRING };
  const entries: AptEntry[] = [{ source, suite: base }];
  if (suite !== base) entries.push({ source, suite });
  const security = sourceOf(`${base}-security`, debian.sources);
  if (security !== undefined) entries.push({ source: security, suite: `${base}-security` });
  return entries;
}

async function firstOf(root: string, candidates: readonly string[]): Promise<string> {
  for (const path of candidates) {
    const there = await readFile(join(root, path)).then(
      () => true,
      () => false,
    );
    if (there) return join(root, path);
  }
  throw new ToolError(`${root} holds none of ${candidates.join(', ')}`, `delete ${root} and run this again`);
}
