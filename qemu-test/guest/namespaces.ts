/** Network namespaces of the guest: an application in one of them talks to the other over the wire, never by loopback. */
import { type ChildProcess, spawn } from 'node:child_process';
import { join } from 'node:path';
import type { TrafficAnswer, TrafficRequest } from '../ipsec/traffic.ts';
import type { Guest } from './guest.ts';

const TRAFFIC = 'qemu-test/ipsec/traffic.js';
const START_MS = 30_000;
const ANSWER_MS = 40_000;

/** Makes namespace `name` with its loopback up. */
export function addNamespace(guest: Guest, name: string): void {
  guest.must(`ip netns add ${name} && ip -n ${name} link set lo up`);
}

/** Sends `count` echo requests from inside a namespace (null: the first one) and needs all the answers. */
export function ping(guest: Guest, from: string | null, to: string, count = 3, size = 56): string {
  const command = `ping -c ${count} -i 0.1 -W 5 -s ${size} ${to}`;
  const output = guest.must(from === null ? command : `ip netns exec ${from} ${command}`);
  const summary = /(\d+) packets transmitted, (\d+) packets received/.exec(output);
  if (summary === null || summary[1] !== summary[2]) throw new Error(`ping ${to}: ${output}`);
  return `${summary[2]} of ${summary[1]}`;
}

/** The traffic process of a namespace: it echoes UDP and TCP, and sends on request. */
export class Traffic {
  readonly #child: ChildProcess;

  private constructor(child: ChildProcess) {
    this.#child = child;
  }

  static async start(guest: Guest, namespace: string | null): Promise<Traffic> {
    const node = [process.execPath, join(guest.dist, TRAFFIC)];
    const [command, ...args] = namespace === null ? node : ['ip', 'netns', 'exec', namespace, ...node];
    const child = spawn(command, args, { stdio: ['ignore', 'inherit', 'inherit', 'ipc'] });
    const traffic = new Traffic(child);
    await traffic.#answer(START_MS);
    return traffic;
  }

  async request(request: TrafficRequest): Promise<string> {
    const answer = this.#answer(ANSWER_MS);
    this.#child.send(request);
    const { ok, detail } = await answer;
    if (!ok) throw new Error(`${request.kind} to ${request.to}: ${detail}`);
    return detail;
  }

  stop(): void {
    this.#child.disconnect();
  }

  #answer(timeoutMs: number): Promise<TrafficAnswer> {
    return new Promise((resolve, reject) => {
      const timer = setTimeout(
        () => reject(new Error(`no answer of the traffic process in ${timeoutMs} ms`)),
        timeoutMs,
      );
      const over = (code: number | null) => {
        clearTimeout(timer);
        reject(new Error(`the traffic process ended with ${code}`));
      };
      this.#child.once('exit', over);
      this.#child.once('message', (message) => {
        clearTimeout(timer);
        this.#child.off('exit', over);
        if (isAnswer(message)) resolve(message);
        else reject(new Error('the traffic process sent something else'));
      });
    });
  }
}

function isAnswer(message: unknown): message is TrafficAnswer {
  return typeof message === 'object' && message !== null && 'ok' in message && 'detail' in message;
}
