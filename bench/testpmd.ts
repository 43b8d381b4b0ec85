/**
 * DPDK's testpmd: its vhost devices are the other end of our vhost-user ports, for `test/judges` and `peers.ts`, and its virtio_user
 * driver is what we are compared with. It needs no hugepages and no root, only what `scripts/fetch-dpdk` puts into a folder of its own.
 */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const PATIENCE_MS = 30_000;
/** Instances so far: each needs a name of its own. */
let started = 0;
const LIBRARIES = 'usr/lib/x86_64-linux-gnu';

/** The folder with testpmd. Throws, saying what to run, when it is not there: without the judge there is no verdict. */
export function dpdkFolder(): string {
  const { status, stdout, stderr, error } = spawnSync(scriptPath(), ['--check'], { encoding: 'utf8', timeout: 10_000 });
  if (error !== undefined) throw error;
  if (status !== 0) throw new Error(stderr.trim());
  return stdout.trim();
}

/** `scripts/fetch-dpdk`, from `bench/` and from `dist/bench/`. */
function scriptPath(): string {
  for (let folder = dirname(fileURLToPath(import.meta.url)); ; folder = dirname(folder)) {
    const path = join(folder, 'scripts/fetch-dpdk');
    if (existsSync(path)) return path;
    if (folder === dirname(folder)) throw new Error('scripts/fetch-dpdk is not there: DPDK is for the repository only');
  }
}

export interface TestpmdOptions {
  /** For its files; goes with the test. */
  readonly folder: string;
  /** `--vdev` arguments: `net_vhost0,iface=/path`. */
  readonly devices: readonly string[];
  /** `--lcores`: the first is for commands, the others forward. Default: two threads on whichever cores are free. */
  readonly cores?: string;
  /** MiB of memory, default 512. It is all cleared at the start. */
  readonly megabytes?: number;
  /** Arguments of testpmd itself, beside `-i`. */
  readonly args?: readonly string[];
}

/** Counters of a port, as `show port stats` prints them. */
export interface PortStatistics {
  readonly received: number;
  readonly sent: number;
}

export class Testpmd {
  readonly #child: ChildProcess;
  readonly #ended: Promise<void>;
  #output = '';

  private constructor(child: ChildProcess) {
    this.#child = child;
    this.#ended = new Promise((resolve) => child.once('close', () => resolve()));
    for (const stream of [child.stdout, child.stderr]) {
      stream?.setEncoding('utf8').on('data', (text: string) => {
        this.#output += text;
      });
    }
  }

  /** Starts it, and waits until it forwards (`--auto-start`) or is ready to. */
  static async start(options: TestpmdOptions): Promise<Testpmd> {
    const folder = dpdkFolder();
    const system = `/${LIBRARIES}`;
    const own = `${folder}/${LIBRARIES}`;
    const abi = ['vhost', 'virtio'].map((name) => soname(own, `librte_net_${name}.so`));
    const memory = [
      '--no-huge',
      '--no-shconf',
      '--file-prefix',
      `vipsec-${process.pid}-${started++}`,
      '-m',
      String(options.megabytes ?? 512),
      '--no-pci',
      '--no-telemetry',
    ];
    const drivers = [...abi, soname(own, 'librte_mempool_ring.so')].flatMap((name) => ['-d', name]);
    const devices = options.devices.flatMap((device) => ['--vdev', device]);
    const eal = [...memory, '--lcores', options.cores ?? anyCores(2), ...drivers, ...devices];
    // Where DPDK is installed too, its libraries come first: loading both would not do.
    const environment = { ...process.env, LD_LIBRARY_PATH: `${system}:${own}`, RUNTIME_DIRECTORY: options.folder };
    const args = [...eal, '--', '-i', '--total-num-mbufs=16384', ...(options.args ?? [])];
    // Line by line: what it prints is looked at while it runs.
    const command = ['-oL', `${folder}/usr/bin/dpdk-testpmd`, ...args];
    const child = spawn('stdbuf', command, { env: environment, stdio: ['pipe', 'pipe', 'pipe'] });
    const testpmd = new Testpmd(child);
    try {
      await testpmd.#until(options.args?.includes('--auto-start') === true ? /forwards packets on/ : /\nDone\n/);
      return testpmd;
    } catch (error) {
      await testpmd.kill();
      throw error;
    }
  }

  get pid(): number {
    return this.#child.pid ?? -1;
  }

  /** All that it has printed. */
  get output(): string {
    return this.#output;
  }

  /** Gives a command, waits until what it prints matches `answer`, and returns that. */
  async command(line: string, answer: RegExp): Promise<RegExpExecArray> {
    const from = this.#output.length;
    this.#child.stdin?.write(`${line}\n`);
    return this.#until(answer, from);
  }

  async statistics(port = 0): Promise<PortStatistics> {
    const answer = /RX-packets:\s*(\d+).*TX-packets:\s*(\d+).*Tx-bps.*####\n/s;
    const [, received, sent] = await this.command(`show port stats ${port}`, answer);
    return { received: Number(received), sent: Number(sent) };
  }

  /** Ends it in good order. */
  async quit(): Promise<void> {
    if (this.#child.exitCode === null && this.#child.signalCode === null) this.#child.stdin?.write('quit\n');
    const timer = setTimeout(() => this.#child.kill('SIGKILL'), 10_000);
    await this.#ended;
    clearTimeout(timer);
  }

  async kill(): Promise<void> {
    this.#child.kill('SIGKILL');
    await this.#ended;
  }

  async #until(answer: RegExp, from = 0): Promise<RegExpExecArray> {
    const deadline = performance.now() + PATIENCE_MS;
    for (;;) {
      const found = answer.exec(this.#output.slice(from));
      if (found !== null) return found;
      const ended = this.#child.exitCode !== null || this.#child.signalCode !== null;
      if (ended || performance.now() > deadline) {
        throw new Error(`testpmd ${ended ? 'ended' : 'does not answer'}: ${this.#output.slice(-2000)}`);
      }
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
  }
}

/** So many threads, none of them bound to a core of its own. */
function anyCores(threads: number): string {
  const all = `(0-${availableParallelism() - 1})`;
  return Array.from({ length: threads }, (_, i) => `${i}@${all}`).join(',');
}

/** The name under which the loader finds a driver: with the version of the interface. */
function soname(folder: string, name: string): string {
  for (let version = 20; version < 60; version++) {
    if (existsSync(`${folder}/${name}.${version}`)) return `${name}.${version}`;
  }
  throw new Error(`${folder} has no ${name}`);
}
