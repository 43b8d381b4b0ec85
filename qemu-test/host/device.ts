/** A process of `vipsec device` beside QEMU: one function, or two that are each other's link. */
import { type ChildProcess, spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { stop } from './process.ts';

const START_MS = 60_000;
const STEP_MS = 20;
const COMPLAINT = 2000;

export interface DeviceOptions {
  /** Folder of the built package. */
  readonly dist: string;
  readonly sockets: readonly string[];
  readonly link: string;
  readonly args: readonly string[];
  /** Called when it ends before it is stopped. */
  readonly onEnd: (reason: string) => void;
}

export class DeviceProcess {
  readonly #child: ChildProcess;
  #complaint = '';
  #stopping = false;

  private constructor({ dist, sockets, link, args, onEnd }: DeviceOptions) {
    const command = ['device', ...sockets.flatMap((path) => ['--socket', path]), '--link', link, ...args];
    this.#child = spawn(process.execPath, [join(dist, 'tools/vipsec.js'), ...command], {
      stdio: ['ignore', 'ignore', 'pipe'],
    });
    this.#child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      this.#complaint = (this.#complaint + text).slice(-COMPLAINT);
    });
    this.#child.once('exit', (code, signal) => {
      if (!this.#stopping) onEnd(`ended with ${code ?? signal}: ${this.#complaint.trim()}`);
    });
  }

  /** Starts it and waits until its sockets are there. */
  static async start(options: DeviceOptions): Promise<DeviceProcess> {
    const device = new DeviceProcess(options);
    const isThere = () => options.sockets.every((path) => existsSync(path));
    for (const deadline = Date.now() + START_MS; !isThere(); await sleep(STEP_MS)) {
      const hasEnded = device.#child.exitCode !== null || device.#child.signalCode !== null;
      if (!hasEnded && Date.now() < deadline) continue;
      await device.stop();
      throw new Error(hasEnded ? `does not start: ${device.#complaint.trim()}` : `has no socket after ${START_MS} ms`);
    }
    return device;
  }

  stop(): Promise<void> {
    this.#stopping = true;
    return stop(this.#child);
  }
}
