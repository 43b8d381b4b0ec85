/**
 * A `vipsec device` in a process of its own, for as long as the demo needs it.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { rmSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { VfioError } from '../../src/index.ts';

/** Milliseconds that a device may take to listen, on a machine that has much else to do, and to end when it is asked to. */
const Deadline = { start: 60_000, stop: 3_000 } as const;

export class DeviceProcess {
  readonly socket: string;
  readonly #child: ChildProcess;
  #ready = false;
  #complaints = '';

  /** Starts `vipsec device --socket socket …args`. */
  constructor(socket: string, args: readonly string[]) {
    this.socket = socket;
    const program = fileURLToPath(new URL('../vipsec.js', import.meta.url));
    this.#child = spawn(process.execPath, [program, 'device', '--socket', socket, ...args], {
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    this.#child.stdout?.once('data', () => {
      this.#ready = true;
    });
    this.#child.stdout?.resume();
    this.#child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      this.#complaints = (this.#complaints + text).slice(-20_000);
    });
    // An error to start is seen as a device that has ended.
    this.#child.on('error', () => {});
    process.on('exit', this.#kill);
  }

  get running(): boolean {
    return this.#child.pid !== undefined && this.#child.exitCode === null && this.#child.signalCode === null;
  }

  /** Resolves once the device has said that it listens; its socket is there a moment before. Throws `VfioError` `DEVICE_START`. */
  async ready(): Promise<void> {
    const deadline = Date.now() + Deadline.start;
    while (!this.#ready) {
      if (!this.running || Date.now() > deadline) {
        const said = this.#complaints.trim();
        throw new VfioError('DEVICE_START', `the software device did not start${said === '' ? '' : `: ${said}`}`);
      }
      await sleep(10);
    }
  }

  /** What the device counts, as it prints it on SIGUSR1. Throws `VfioError` `DEVICE_STATISTICS` when it does not answer. */
  async statistics(): Promise<DeviceStatistics> {
    this.#complaints = '';
    this.#child.kill('SIGUSR1');
    const deadline = Date.now() + Deadline.start;
    while (this.running && Date.now() < deadline) {
      const line = this.#complaints.split('\n').find((text) => text.startsWith('['));
      if (line !== undefined && this.#complaints.endsWith('\n')) return statisticsOf(JSON.parse(line));
      await sleep(5);
    }
    throw new VfioError('DEVICE_STATISTICS', 'the software device did not tell its counters');
  }

  /** Ends the process, with force when it does not listen, and removes its socket. */
  async stop(): Promise<void> {
    if (this.running) {
      const ended = once(this.#child, 'exit');
      this.#child.kill('SIGTERM');
      const timer = setTimeout(this.#kill, Deadline.stop);
      await ended;
      clearTimeout(timer);
    }
    process.removeListener('exit', this.#kill);
    rmSync(this.socket, { force: true });
  }

  readonly #kill = (): void => {
    if (this.running) this.#child.kill('SIGKILL');
  };
}

/** Of one function: what its IPsec made of received packets, by verdict. Absent verdicts never were. */
export interface DeviceStatistics {
  readonly unprotect: Readonly<Record<string, number>>;
}

function statisticsOf(document: unknown): DeviceStatistics {
  const first: unknown = Array.isArray(document) ? document[0] : undefined;
  const counts = typeof first === 'object' && first !== null && 'unprotect' in first ? first.unprotect : {};
  const unprotect: Record<string, number> = {};
  for (const [verdict, count] of Object.entries(counts ?? {})) unprotect[verdict] = Number(count);
  return { unprotect };
}
