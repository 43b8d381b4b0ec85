/** Network namespaces of the guest: an application in one of them talks to the other over the wire, never by loopback. */
import type { TrafficAnswer, TrafficRequest } from '../ipsec/traffic.ts';
import type { Guest } from './guest.ts';
import { inNamespace } from './network-namespace.ts';
import { Helper } from './process.ts';

const TRAFFIC = 'qemu-test/ipsec/traffic.js';
/** Echo requests of a size. */
const COUNT = 3;

/** Makes namespace `name` with its loopback up. */
export function addNamespace(guest: Guest, name: string): void {
  guest.must(`ip netns add ${name} && ip -n ${name} link set lo up`);
}

/** Runs lines of `ip -batch` in a namespace; null: the first one. */
export function ip(guest: Guest, namespace: string | null, lines: readonly string[]): void {
  inNamespace(namespace, () => guest.must('ip -batch -', `${lines.join('\n')}\n`));
}

/** Sends `COUNT` echo requests of each size from inside a namespace (null: the first one) and needs all the answers. */
export function ping(guest: Guest, from: string | null, to: string, sizes: readonly number[] = [56]): string {
  const commands = sizes.map((size) => `ping -c ${COUNT} -i 0.01 -W 30 -s ${size} ${to}`);
  const output = inNamespace(from, () => guest.must(commands.join(' && ')));
  const counts = [...output.matchAll(/(\d+) packets transmitted, (\d+) packets received/g)];
  if (counts.length !== sizes.length || counts.some(([, sent, received]) => sent !== received)) {
    throw new Error(`ping ${to}: ${output}`);
  }
  return counts.map(([, sent, received]) => `${received} of ${sent}`).join(', ');
}

/** The traffic process of a namespace: it echoes UDP and TCP, and sends on request. */
export class Traffic {
  readonly #helper: Helper;

  private constructor(helper: Helper) {
    this.#helper = helper;
  }

  static async start(guest: Guest, namespace: string | null): Promise<Traffic> {
    const node = guest.nodeCommand(TRAFFIC, []);
    const command = namespace === null ? node : ['ip', 'netns', 'exec', namespace, ...node];
    return new Traffic(await Helper.start(`the traffic process of ${namespace ?? 'the first namespace'}`, command));
  }

  async request(request: TrafficRequest): Promise<string> {
    const answer = await this.#helper.request(request);
    if (!isAnswer(answer)) throw new Error('the traffic process sent something else');
    if (!answer.ok) throw new Error(`${request.kind} to ${request.to}: ${answer.detail}`);
    return answer.detail;
  }

  stop(): void {
    this.#helper.stop();
  }
}

function isAnswer(message: unknown): message is TrafficAnswer {
  return typeof message === 'object' && message !== null && 'ok' in message && 'detail' in message;
}
