/**
 * The process beside a test file in which its software devices run: a device there takes milliseconds, one in a process of its own the third
 * of a second that a program needs to start. For tests in which no device must die.
 */
import { type ChildProcess, fork } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import type { DeviceOptions } from '../../src/device/index.ts';

const script = fileURLToPath(new URL('./device-host.mjs', import.meta.url));

/** Bytes of address space of each device: enough for any driver here, and a small part of what the garbage collector minds. */
const MEMORY = 2 ** 28;

interface Answer {
  readonly id: number;
  readonly value?: unknown;
  readonly error: string | null;
}

export class DeviceHost {
  readonly #child: ChildProcess = fork(script, { stdio: ['ignore', 'inherit', 'inherit', 'ipc'] });
  readonly #pending = new Map<number, (answer: Answer) => void>();
  #requests = 0;
  #devices = 0;
  #ended = false;

  constructor() {
    this.#child.on('message', (answer: Answer) => this.#pending.get(answer.id)?.(answer));
    this.#child.once('exit', () => {
      this.#ended = true;
      for (const [id, settle] of this.#pending) settle({ id, error: 'the process of the devices has ended' });
    });
    // It ends with us, and does not keep us.
    this.#child.unref();
    this.#child.channel?.unref();
  }

  /** Whether it can have no more devices. */
  get ended(): boolean {
    return this.#ended;
  }

  async start(options: DeviceOptions): Promise<HostedDevice> {
    const number = ++this.#devices;
    await this.#ask(number, 'start', { memory: MEMORY, ...options });
    return {
      stop: async () => {
        const internalErrors = await this.#ask(number, 'stop');
        if (internalErrors !== 0) throw new Error(`the device had ${internalErrors} internal errors`);
      },
      statistics: async () => {
        const functions = await this.#ask(number, 'statistics');
        if (!Array.isArray(functions)) throw new Error('no statistics');
        return functions;
      },
      announce: async () => {
        await this.#ask(number, 'announce');
      },
    };
  }

  async #ask(device: number, action: string, options?: DeviceOptions): Promise<unknown> {
    const id = ++this.#requests;
    const answer = await new Promise<Answer>((resolve) => {
      if (this.#ended) resolve({ id, error: 'the process of the devices has ended' });
      this.#pending.set(id, resolve);
      this.#child.send({ id, device, action, options }, (error) => {
        if (error !== null) resolve({ id, error: error.message });
      });
    });
    this.#pending.delete(id);
    if (answer.error !== null) throw new Error(answer.error);
    return answer.value;
  }
}

/** One device of a host. */
export interface HostedDevice {
  /** Ends it, and throws when it had to survive a bug of its own. */
  stop(): Promise<void>;
  /** Counters and state of each function. */
  statistics(): Promise<readonly unknown[]>;
  /** Has it ask its drivers to announce themselves. */
  announce(): Promise<void>;
}

let shared: DeviceHost | null = null;

/** The host of this test file: started when it is first asked for. */
export function deviceHost(): DeviceHost {
  if (shared === null || shared.ended) shared = new DeviceHost();
  return shared;
}
