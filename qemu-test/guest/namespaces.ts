/** Network namespaces of the guest: an application in one of them talks to the other over the wire, never by loopback. */
import type { Guest } from './guest.ts';
import { inNamespace } from './network-namespace.ts';

/** Echo requests of a size. */
const COUNT = 3;

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
