/**
 * Large packets between Linux's virtio_net and our driver, over the software device. Between two of its functions packets of up to 64 KiB stay
 * what they are; on their way to a wire the device cuts them and fills each checksum, which the kernel at the other end of the wire,
 * behind a NIC without offloads, verifies.
 */
import { bindFunction } from '../../src/vfio/bind.ts';
import type { Guest } from '../guest/guest.ts';
import { BridgedNamespace, mustBeClean, mustBeLarge, STREAM_BYTES, sendLarge } from '../guest/large.ts';
import { addNamespace, Traffic } from '../guest/namespaces.ts';
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
    for (const to of [right.v4, right.v6]) await near.request({ kind: 'tcp', to, bytes: STREAM_BYTES });
    for (const to of [left.v4, left.v6]) await far.request({ kind: 'tcp', to, bytes: STREAM_BYTES });
    for (const side of SIDES) mustBeClean(guest, side);
    return SIDES.map((side) => averageReceived(guest, side)).join('; ');
  });
  far.stop();
  guest.must('ip netns del right');
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
      await near.request({ kind: 'tcp', to: right.v4, bytes: STREAM_BYTES });
      const { toDevice, fromDevice } = await ours.stream([]);
      mustBeClean(guest, 'left');
      return `${mustBeLarge('sent', toDevice)}; ${mustBeLarge('received', fromDevice)}`;
    });
  }
  near.stop();
  await guest.check(LargeCheck.wire, () => cutForWire(guest, wire));
}

/** The interface of function `id` in a network namespace of its own, with a traffic process. */
function giveToLinux(guest: Guest, id: Side): Promise<Traffic> {
  const name = guest.interface(id);
  addNamespace(guest, id);
  guest.must(`ip link set ${name} netns ${id} && ip -n ${id} link set ${name} name ${id} up`);
  guest.must(
    `ip -n ${id} addr add ${END[id].v4}/24 dev ${id} && ip -n ${id} addr add ${END[id].v6}/64 dev ${id} nodad`,
  );
  sendLarge(guest, id);
  return Traffic.start(guest, id);
}

/** Bytes of the average packet that virtio_net has received, acknowledgements included: more than the longest frame, or it throws. */
function averageReceived(guest: Guest, side: Side): string {
  const statistics = guest.must(`ip netns exec ${side} ethtool -S ${side}`);
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
  const far = await Traffic.start(guest, namespace);
  await using ours = await BridgedNamespace.open(guest, {
    address,
    ring: 'packed',
    name: 'ours-wire',
    mac,
    addresses: [`${here}/24`],
  });
  const { toDevice, fromDevice } = await ours.stream([there]);
  mustBeClean(guest, namespace);
  far.stop();
  if (fromDevice.longest > LONGEST_FRAME) throw new Error(`a frame of ${fromDevice.longest} bytes came over the wire`);
  return `${mustBeLarge('sent', toDevice)}; received ${fromDevice.packets}, up to ${fromDevice.longest} bytes`;
}
