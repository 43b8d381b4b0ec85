/**
 * What a guest is like between two scenarios: no function is bound to a driver, there is no network but the loopback, nobody runs, nothing is
 * held. A scenario gets its functions from here, and they are taken back, with the network namespaces. What a scenario should have let go
 * of itself (processes, open functions, memory, addresses, the kernel's IPsec) is not put right but named.
 */
import { execFileSync } from 'node:child_process';
import { existsSync, readdirSync, readFileSync, readlinkSync, writeFileSync } from 'node:fs';
import { networkInterfaces } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

const PCI = '/sys/bus/pci';
const NAMESPACES = '/run/netns';
/** Modules of the kernel's IPsec, which each of its states holds. */
const IPSEC_MODULES = ['esp4', 'esp6', 'ah4', 'ah6'];
/** Files that stay open as long as a function or a tap is in use. */
const HELD = /^\/dev\/(?:vfio|net)\/|vfio|memfd/;
/** What was let go of may take so long to be gone: processes end, and the kernel cleans up, by themselves. */
const LEFT_MS = 30_000;
const STEP_MS = 25;

export class GuestState {
  readonly #functions: readonly string[];
  readonly #processes = new Set(processes());
  readonly #resources = resources();

  /** `functions`: the PCI addresses of the scenario's. */
  constructor(functions: readonly string[]) {
    this.#functions = functions;
  }

  /** Lets the kernel find a driver for each function, as a machine does that boots with them: the guest's does not by itself. */
  giveFunctions(): void {
    for (const address of this.#functions) writeFileSync(join(PCI, 'drivers_probe'), address);
  }

  /** Takes the functions back, and returns what was left behind when it has had time to go. */
  async restore(): Promise<string[]> {
    const held = await this.#wait(() => [...this.#left(), ...openFiles()]);
    // Taking a function from vfio-pci would wait for whoever has it open.
    if (held.length > 0) return held;
    for (const address of this.#functions) release(address);
    if (namespaces().length > 0) execFileSync('sh', ['-c', `umount ${NAMESPACES}/* && rm ${NAMESPACES}/*`]);
    return this.#wait(() => [...this.#left(), ...networks(), ...pages(), ...ipsec()]);
  }

  #left(): string[] {
    return [
      ...processes()
        .filter((pid) => !this.#processes.has(pid))
        .map((pid) => `process ${pid}, ${nameOf(pid)}`),
      ...surplus(resources(), this.#resources).map((what) => `an active ${what} of the guest's process`),
    ];
  }

  async #wait(look: () => string[]): Promise<string[]> {
    for (const deadline = performance.now() + LEFT_MS; ; await sleep(STEP_MS)) {
      const left = look();
      if (left.length === 0 || performance.now() > deadline) return left;
    }
  }
}

/** Takes function `address` from its driver. It may have been unplugged. */
function release(address: string): void {
  const folder = join(PCI, 'devices', address);
  if (!existsSync(folder)) return;
  writeFileSync(join(folder, 'driver_override'), '\n');
  if (existsSync(join(folder, 'driver'))) writeFileSync(join(folder, 'driver/unbind'), address);
}

/** Children of this process, and of the first one, which has those that lost their parent. */
function processes(): string[] {
  return ['1', String(process.pid)].flatMap((pid) =>
    readdirSync(`/proc/${pid}/task`)
      .flatMap((thread) => read(`/proc/${pid}/task/${thread}/children`).split(' '))
      .filter((child) => child !== '' && child !== String(process.pid)),
  );
}

function nameOf(pid: string): string {
  return read(`/proc/${pid}/cmdline`).replaceAll('\0', ' ').trim();
}

/** What keeps the event loop going: sockets, timers, child processes, worker threads. The terminals are this process's own. */
function resources(): string[] {
  return process.getActiveResourcesInfo().filter((what) => what !== 'TTYWrap');
}

function surplus(now: readonly string[], before: readonly string[]): string[] {
  const known = [...before];
  return now.filter((what) => {
    const at = known.indexOf(what);
    if (at >= 0) known.splice(at, 1);
    return at < 0;
  });
}

function openFiles(): string[] {
  return readdirSync('/proc/self/fd')
    .map((fd) => linkOf(`/proc/self/fd/${fd}`))
    .filter((target) => HELD.test(target))
    .map((target) => `an open ${target}`);
}

function networks(): string[] {
  const addresses = Object.entries(networkInterfaces())
    .flatMap(([name, list = []]) => list.map(({ address }) => ({ name, address })))
    .filter(({ address }) => address !== '127.0.0.1' && address !== '::1');
  const interfaces = readdirSync('/sys/class/net').filter((name) => name !== 'lo');
  return [
    ...interfaces.map((name) => `the interface ${name}`),
    ...addresses.map(({ name, address }) => `the address ${address} of ${name}`),
  ];
}

function pages(): string[] {
  const text = read('/proc/meminfo');
  const [total, free] = ['Total', 'Free'].map(
    (what) => new RegExp(`^HugePages_${what}:\\s+(\\d+)$`, 'm').exec(text)?.[1],
  );
  return total === free ? [] : [`huge pages: ${free} of ${total} are free`];
}

function namespaces(): string[] {
  return existsSync(NAMESPACES) ? readdirSync(NAMESPACES) : [];
}

/** `esp4 28672 2 - Live 0x…`: the third word counts who holds the module. */
function ipsec(): string[] {
  return read('/proc/modules')
    .split('\n')
    .map((line) => line.split(' '))
    .filter(([name, , users]) => IPSEC_MODULES.includes(name) && users !== '0')
    .map(([name]) => `IPsec states of the kernel (${name})`);
}

/** A file of procfs; empty when what it tells of is gone. */
function read(path: string): string {
  try {
    return readFileSync(path, 'utf8').trim();
  } catch {
    return '';
  }
}

function linkOf(path: string): string {
  try {
    return readlinkSync(path);
  } catch {
    return '';
  }
}
