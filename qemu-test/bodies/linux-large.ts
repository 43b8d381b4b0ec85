/**
 * Large packets between Linux's virtio_net and our driver, over the software device. Between two of its functions packets of up to 64 KiB stay
 * what they are; on their way to a wire the device cuts them and fills each checksum, which the kernel at the other end of the wire,
 * behind a NIC without offloads, verifies.
 */
import { bindFunction } from '../../src/vfio/bind.ts';
import { Application } from '../guest/application.ts';
import type { Guest } from '../guest/guest.ts';
import { BridgedNamespace, mustBeClean, mustBeLarge, STREAM_BYTES, sendLarge } from '../guest/large.ts';
import { ip } from '../guest/namespaces.ts';
import { inNamespace } from '../guest/network-namespace.ts';
import type { ScenarioDevice } from '../scenario.ts';

const LONGEST_FRAME = 1514;
const RINGS = ['split', 'packed'] as const;
const SIDES = ['left', 'right'] as const;
type Side = (typeof SIDES)[number];
const END = {
  left: { mac: '52:54:00:00:0e:01', v4: '10.9.0.1', v6: 'fd00:9::1' },
  right: { mac: '52:54:00:00:0e:02', v4: '10.9.0.2', v6: 'fd00:9::2' },
} as const;

export const LargeCheck = {
  linux: "large packets cross between two of Linux's virtio_net, both ways, IPv4 and IPv6",
  split: "large packets cross between Linux's virtio_net and our driver, both ways, split",
  packed: "large packets cross between Linux's virtio_net and our driver, both ways, packed",
  wire: 'large packets of our driver are cut for a wire, with checksums that Linux finds right',
} as const;

/** Two functions of one process. */
export const largeDevices: readonly ScenarioDevice[] = [
  { kind: 'vfio-user', id: 'left', link: { pair: 'right' }, args: SIDES.flatMap((side) => ['--mac', END[side].mac]) },
  { kind: 'vfio-user', id: 'right', link: { pair: 'left' } },
];

/** A function with a link `wire`, and a NIC of the kernel's at its other end. */
export interface Wire {
  readonly id: string;
  readonly mac: string;
  readonly here: string;
  /** Address at the other end, and the namespace that has it. */
  readonly there: string;
  readonly namespace: string;
}

/** All checks. The functions are virtio_net's; that of the wire is not any more afterwards. */
export async function largePackets(guest: Guest, wire: Wire): Promise<void> {
  const { left, right } = END;
  const near = await giveToLinux(guest, 'left');
  const far = await giveToLinux(guest, 'right');
  await guest.check(LargeCheck.linux, async () => {
    for (const to of [right.v4, right.v6]) await near.stream(to, STREAM_BYTES);
    for (const to of [left.v4, left.v6]) await far.stream(to, STREAM_BYTES);
    for (const side of SIDES) mustBeClean(side);
    return SIDES.map((side) => averageReceived(guest, side)).join('; ');
  });
  await far[Symbol.asyncDispose]();
  const address = guest.address('right');
  bindFunction(address);
  for (const ring of RINGS) {
    await guest.check(LargeCheck[ring], async () => {
      const addresses = [`${right.v4}/24`, `${right.v6}/64`];
      await using ours = await BridgedNamespace.open(guest, {
        address,
        ring,
        name: `ours-${ring}`,
        mac: right.mac,
        addresses,
      });
      await ours.stream([left.v4, left.v6]);
      await near.stream(right.v4, STREAM_BYTES);
      const { toDevice, fromDevice } = await ours.stream([]);
      mustBeClean('left');
      return `${mustBeLarge('sent', toDevice)}; ${mustBeLarge('received', fromDevice)}`;
    });
  }
  await near[Symbol.asyncDispose]();
  ip(
    guest,
    null,
    SIDES.map((side) => `netns del ${side}`),
  );
  await guest.check(LargeCheck.wire, () => cutForWire(guest, wire));
}

/** The interface of function `id` in a network namespace of its own, with an application. */
function giveToLinux(guest: Guest, id: Side): Promise<Application> {
  const name = guest.interface(id);
  ip(guest, null, [`netns add ${id}`, `link set ${name} netns ${id}`]);
  ip(guest, id, [
    `link set ${name} name ${id} up`,
    `addr add ${END[id].v4}/24 dev ${id}`,
    `addr add ${END[id].v6}/64 dev ${id} nodad`,
  ]);
  sendLarge(id);
  return Application.start(id);
}

/** Bytes of the average packet that virtio_net has received, acknowledgements included: more than the longest frame, or it throws. */
function averageReceived(guest: Guest, side: Side): string {
  const statistics = inNamespace(side, () => guest.must(`ethtool -S ${side}`));
  const sum = (what: string) =>
    [...statistics.matchAll(new RegExp(`^\\s*rx_queue_\\d+_${what}: (\\d+)$`, 'gm'))].reduce(
      (n, m) => n + Number(m[1]),
      0,
    );
  const [packets, bytes] = [sum('packets'), sum('bytes')];
  if (bytes < 4 * STREAM_BYTES || bytes <= LONGEST_FRAME * packets)
    throw new Error(`${side}: ${packets} packets, ${bytes} bytes`);
  return `${side} received ${packets} packets of ${Math.round(bytes / packets)} bytes on the average`;
}

async function cutForWire(guest: Guest, { id, mac, here, there, namespace }: Wire): Promise<string> {
  const address = guest.address(id);
  bindFunction(address);
  await using _far = await Application.start(namespace);
  await using ours = await BridgedNamespace.open(guest, {
    address,
    ring: 'packed',
    name: 'ours-wire',
    mac,
    addresses: [`${here}/24`],
  });
  const { toDevice, fromDevice } = await ours.stream([there]);
  mustBeClean(namespace);
  if (fromDevice.longest > LONGEST_FRAME) throw new Error(`a frame of ${fromDevice.longest} bytes came over the wire`);
  return `${mustBeLarge('sent', toDevice)}; received ${fromDevice.packets}, up to ${fromDevice.longest} bytes`;
}
