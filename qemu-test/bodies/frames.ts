/**
 * Frames whose every byte is known beforehand, sent and expected by both ends of a wire. The application's half works on any
 * `Nic`: over vfio-user, over stock QEMU, over the IPsec function.
 */
import type { Nic } from '../../src/index.ts';

const HEADER = 14;
const SMALLEST = 60;
/** IEEE 802: for local experiments. */
const ETHERTYPE = 0x88b5;
/** A turn of the event loop for every so many empty polls. */
const POLLS_PER_TURN = 64;
const BURST = 64;

export type Side = 'nic' | 'wire';

/** Frame `index` that `side` sends, of a length between the smallest and `HEADER + mtu`. */
export function testFrame(side: Side, index: number, mtu: number): Uint8Array {
  const range = HEADER + mtu - SMALLEST + 1;
  // A step that has no factor with any range below a prime visits short, long and odd lengths soon.
  const length = SMALLEST + ((index * 7919) % range);
  const frame = new Uint8Array(length);
  frame.set([0x02, 0, 0, 0, 0, side === 'nic' ? 2 : 1, 0x02, 0, 0, 0, 0, side === 'nic' ? 1 : 2]);
  frame[12] = ETHERTYPE >> 8;
  frame[13] = ETHERTYPE & 0xff;
  const words = new Uint32Array(Math.ceil((length - HEADER) / 4));
  let state = (index + 1) * 2654435761 + (side === 'nic' ? 1 : 0);
  for (let i = 0; i < words.length; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    words[i] = state;
  }
  frame.set(new Uint8Array(words.buffer, 0, length - HEADER), HEADER);
  frame[HEADER] = index >> 8;
  frame[HEADER + 1] = index & 0xff;
  return frame;
}

export function isTestFrame(frame: Uint8Array): boolean {
  return frame.length >= SMALLEST && frame[12] === ETHERTYPE >> 8 && frame[13] === (ETHERTYPE & 0xff);
}

/** Throws unless `frame` is frame `index` of `side`, byte for byte. */
export function checkTestFrame(frame: Uint8Array, side: Side, index: number, mtu: number): void {
  const wanted = testFrame(side, index, mtu);
  if (frame.length !== wanted.length) throw new Error(`frame ${index}: ${frame.length} bytes, not ${wanted.length}`);
  if (Buffer.compare(wanted, frame) === 0) return;
  const at = wanted.findIndex((byte, i) => byte !== frame[i]);
  throw new Error(`frame ${index}: byte ${at} is ${frame[at]}, not ${wanted[at]}`);
}

/** Calls `step` until it returns true, with turns of the event loop in between. */
export async function poll(step: () => boolean, timeoutMs: number, what: string): Promise<void> {
  const deadline = performance.now() + timeoutMs;
  for (let polls = 1; !step(); polls++) {
    if (polls % POLLS_PER_TURN !== 0) continue;
    if (performance.now() > deadline) throw new Error(`${what}: not done after ${timeoutMs} ms`);
    await new Promise((resolve) => setImmediate(resolve));
  }
}

/** Sends frames 0 to `count - 1` through the first queue, in bursts. */
export async function sendFrames(nic: Nic, count: number, timeoutMs = 20_000): Promise<void> {
  const { packets } = nic;
  const [{ tx }] = nic.queues;
  const burst = new Uint32Array(BURST);
  let sent = 0;
  await poll(
    () => {
      if (nic.broken !== null) throw nic.broken;
      tx.reclaim();
      const n = packets.allocate(burst, Math.min(BURST, count - sent, tx.room));
      for (let i = 0; i < n; i++) packets.write(burst[i], testFrame('nic', sent + i, nic.mtu));
      const taken = tx.burst(burst, n);
      if (taken < n) packets.free(burst.subarray(taken), n - taken);
      sent += taken;
      return sent === count;
    },
    timeoutMs,
    'sending',
  );
}

/** Receives frames 0 to `count - 1` of the wire, in order; other frames (the wire's own chatter) are let by. */
export async function receiveFrames(nic: Nic, count: number, timeoutMs = 20_000): Promise<void> {
  const { packets } = nic;
  const [{ rx }] = nic.queues;
  const burst = new Uint32Array(BURST);
  let received = 0;
  await poll(
    () => {
      if (nic.broken !== null) throw nic.broken;
      const n = rx.burst(burst, BURST);
      for (let i = 0; i < n; i++) {
        const frame = packets.read(burst[i]);
        if (isTestFrame(frame)) checkTestFrame(frame, 'wire', received++, nic.mtu);
      }
      packets.free(burst, n);
      return received >= count;
    },
    timeoutMs,
    `receiving (${received} of ${count})`,
  );
}

/** Waits for frame `index` of the wire, asleep or not, as the policy of the first queue says. */
export async function waitForFrame(nic: Nic, index: number, timeoutMs = 20_000): Promise<void> {
  const { packets } = nic;
  const [{ rx }] = nic.queues;
  const burst = new Uint32Array(BURST);
  for (let received = index; received === index; ) {
    if (!(await rx.wait(timeoutMs))) throw new Error(`frame ${index} did not come in ${timeoutMs} ms`);
    const n = rx.burst(burst, BURST);
    for (let i = 0; i < n; i++) {
      const frame = packets.read(burst[i]);
      if (isTestFrame(frame)) checkTestFrame(frame, 'wire', received++, nic.mtu);
    }
    packets.free(burst, n);
  }
}
