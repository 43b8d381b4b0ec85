/** Which of some frames the device passes to its driver, and in which queue: what checks of filters and of steering ask. */
import { Ethernet } from '../packet/fields.ts';
import type { Bench, UpOptions } from './bench.ts';
import { Failed } from './check.ts';
import type { ControlConsole } from './control-console.ts';
import type { Driver, Received } from './driver.ts';
import { isEqual, udpFrame } from './frames.ts';
import type { Network } from './network.ts';

/** A device with a control queue, and the other side of its link. */
export interface Controlled {
  readonly driver: Driver;
  readonly network: Network;
  readonly control: ControlConsole;
}

export async function controlled(bench: Bench, options: UpOptions): Promise<Controlled> {
  const { driver, network } = await bench.network({ ...options, control: true });
  return { driver, network, control: bench.control(driver) };
}

/** Addresses that checks send to: of nobody, of a group, of all. */
export const Mac = {
  stranger: Uint8Array.of(0x02, 0x99, 0x88, 0x77, 0x66, 0x55),
  group: Uint8Array.of(0x01, 0x00, 0x5e, 0x01, 0x02, 0x03),
  all: new Uint8Array(6).fill(0xff),
} as const;

/** A frame to the driver of the device under test; to `destination`, and with a VLAN tag when told so. */
export function frameTo(network: Network, destination = network.inward.destination, vlan?: number): Uint8Array {
  const frame = udpFrame({ ...network.inward, destination });
  if (vlan === undefined) return frame;
  const tagged = new Uint8Array(frame.length + TAG.length);
  tagged.set(frame.subarray(0, Ethernet.type));
  tagged.set([TAG.type >>> 8, TAG.type & 0xff, vlan >>> 8, vlan & 0xff], Ethernet.type);
  tagged.set(frame.subarray(Ethernet.type), Ethernet.type + TAG.length);
  return tagged;
}

/** IEEE 802.1Q. */
const TAG = { length: 4, type: 0x8100 } as const;

/**
 * Sends `frames` to the device, and then `last`, which must arrive: on a link that keeps the order nothing is to be waited for. Which of
 * `frames` arrived.
 */
export async function delivered(
  { driver, network }: Controlled,
  frames: readonly Uint8Array[],
  last: Uint8Array,
): Promise<boolean[]> {
  for (const frame of [...frames, last]) await network.inject(frame);
  const came: Uint8Array[] = [];
  for (;;) {
    const received = await receiveAny(driver);
    if (received === null) throw new Failed('a packet that the device must pass did not arrive');
    if (isEqual(received.frame, last)) return frames.map((frame) => came.some((one) => isEqual(one, frame)));
    came.push(received.frame);
  }
}

/** The queue in which `frame` arrives. Throws `Failed` when it does not. */
export async function arrivalQueue({ driver, network }: Controlled, frame: Uint8Array): Promise<Received> {
  await network.inject(frame);
  for (;;) {
    const received = await receiveAny(driver);
    if (received === null) throw new Failed('a packet did not arrive');
    if (isEqual(received.frame, frame)) return received;
  }
}

/** The next frame in any receive queue; null when none comes in time. */
export async function receiveAny(driver: Driver): Promise<Received | null> {
  const ready = () => driver.receiveQueues.find((index) => driver.ring(index).pending > 0);
  await driver.patience.until(() => ready() !== undefined);
  const index = ready();
  return index === undefined ? null : driver.receive(0, index);
}
