/**
 * The software device: bursts of 32 packets through the driver's queues into the device and, over its loopback, back;
 * everything in one thread, without event loop and socket. `plain` is copying; `inline` also protects each packet on
 * the way out and opens it on the way in (AES-128-GCM tunnel, a flow filter rule). A packet that came back counts
 * once; Gbit/s are of the inner frame. `tcp_stream` is a bulk transfer between two functions (`tcp-stream.ts`).
 */
import { Arena } from '../../src/device/arena.ts';
import { makeFunction, makePool, maxFrameOf } from '../../src/device/assemble.ts';
import { NO_FAULTS } from '../../src/device/faults.ts';
import { loopbackLink } from '../../src/device/links/pair.ts';
import type { NetDevice } from '../../src/device/net.ts';
import type { SaObject } from '../../src/ipsec/wire/codec.ts';
import { AeadAlgorithm, IpsecMode, SaDirection } from '../../src/ipsec/wire/numbers.ts';
import { ipsecWire } from '../../src/ipsec/wire/revisions.ts';
import { Esp, Ethernet, EtherType, IpProtocol, Ipv4, Udp } from '../../src/packet/fields.ts';
import { PacketPool } from '../../src/packet/pool.ts';
import {
  AdminOpcode,
  encodeAdminCommand,
  encodeCapabilityCommand,
  encodeIdList,
  encodeResourceCommand,
  ResourceType,
} from '../../src/virtio/admin-wire.ts';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import {
  encodeClassifier,
  encodeGroup,
  encodeRule,
  FlowFilterAction,
  SelectorType,
} from '../../src/virtio-net/flow-filter-wire.ts';
import { netHeaderLayout } from '../../src/virtio-net/header.ts';
import { RxQueue } from '../../src/virtio-net/rx.ts';
import { createSaTable } from '../../src/virtio-net/sa-table.ts';
import { TxQueue } from '../../src/virtio-net/tx.ts';
import { virtqueueBytes } from '../../src/virtqueue/create.ts';
import { SplitVirtqueue } from '../../src/virtqueue/split.ts';
import { Guest, initialize } from '../device-guest.ts';
import { type BenchSuite, rate, ratio, type Workload } from '../harness.ts';
import { Slot, tcpStream } from '../tcp-stream.ts';

const REVISION = 'virtio-1.4';
const BURST = 32;
const RING = 256;
const PACKETS = 1024;
const SLOT = 2048;
/** Bursts per call of `run`. */
const BURSTS = 16;
const MTU = 1700;
const SA_HANDLE = 1;
const OBJECT = 5;
const FEATURES = FeatureSet.of(Feature.VERSION_1, Feature.IPSEC, Feature.ADMIN_VQ);
const wire = ipsecWire(REVISION);

function admin(device: NetDevice, opcode: number, data: Uint8Array): Uint8Array {
  const command = new Uint8Array(4096);
  encodeAdminCommand(command, { opcode, groupType: 0, groupMemberId: 0n, data });
  const reply = device.admin?.execute(command);
  if (reply?.status !== 0) throw new Error(`command ${opcode}: status ${reply?.status}`);
  return reply.result ?? new Uint8Array(0);
}

function create(device: NetDevice, type: number, id: number, object: Uint8Array): void {
  const opcode = AdminOpcode.RESOURCE_OBJ_CREATE;
  admin(device, opcode, encodeResourceCommand(REVISION, opcode, { type, id, object }));
}

/** An SA each way, and a rule that sends ESP to IPsec. */
function secure(device: NetDevice): void {
  admin(device, AdminOpcode.LIST_USE, encodeIdList([0, 1, 7, 8, 9, 10, 11, 12, 13]));
  for (const id of [0x800, 0x801, 0x802, 0x803, 0x804]) {
    const offered = admin(device, AdminOpcode.DEVICE_CAP_GET, encodeCapabilityCommand(id));
    admin(device, AdminOpcode.DRIVER_CAP_SET, encodeCapabilityCommand(id, offered));
  }
  const none = new Uint8Array(0);
  const addresses = { source: Uint8Array.of(192, 0, 2, 1), destination: Uint8Array.of(192, 0, 2, 2) };
  const outbound: SaObject = {
    ...{ mode: IpsecMode.espTunnel, direction: SaDirection.outbound, objectId: OBJECT, spi: 0x1001, options: 0n },
    ...{ salt: Uint8Array.of(1, 2, 3, 4), tunnel: { ...addresses, dscp: 0, df: false, ttl: 64, flowLabel: 0 } },
    ...{ udpSourcePort: 0, udpDestinationPort: 0, replayWindow: 0, esn: 0n, authAlgorithm: 0n, authKey: none },
    ...{ cipherAlgorithm: BigInt(AeadAlgorithm['aes-gcm']), cipherKey: new Uint8Array(16).fill(7) },
    ...{ softPackets: 0n, softBytes: 0n, hardPackets: 0n, hardBytes: 0n },
  };
  const bytes = new Uint8Array(wire.saObjectSize);
  wire.encodeSa(outbound, bytes);
  create(device, ResourceType.NET_IPSEC_OUTB_SA, OBJECT, bytes);
  wire.encodeSa({ ...outbound, direction: SaDirection.inbound, tunnel: null, replayWindow: 1024 }, bytes);
  create(device, ResourceType.NET_IPSEC_INB_SA, OBJECT, bytes);

  const masks = [Ethernet.length, Ipv4.minLength, Esp.length].map((length) => new Uint8Array(length));
  masks[0].fill(0xff, Ethernet.type);
  masks[1][Ipv4.protocol] = 0xff;
  masks[2].fill(0xff, Esp.spi, Esp.spi + 4);
  const types = [SelectorType.eth, SelectorType.ipv4, SelectorType.esp];
  const key = new Uint8Array(Ethernet.length + Ipv4.minLength + Esp.length);
  key[Ethernet.type] = EtherType.ipv4 >>> 8;
  key[Ethernet.length + Ipv4.protocol] = IpProtocol.esp;
  key.set([0, 0, 0x10, 0x01], Ethernet.length + Ipv4.minLength);
  create(device, ResourceType.NET_FF_GROUP, 0, encodeGroup({ priority: 1 }));
  const selectors = masks.map((mask, i) => ({ type: types[i], flags: 0, mask }));
  create(device, ResourceType.NET_FF_CLASSIFIER, 0, encodeClassifier({ selectors }));
  const rule = { groupId: 0, classifierId: 0, priority: 1, action: FlowFilterAction.ipsec, queueIndex: 0, key };
  create(device, ResourceType.NET_FF_RULE, 0, encodeRule(rule));
}

/** An Ethernet frame of `size` bytes with an IPv4 UDP packet. */
function udpFrame(size: number): Uint8Array {
  const frame = new Uint8Array(size);
  frame[Ethernet.type] = EtherType.ipv4 >>> 8;
  const ip = frame.subarray(Ethernet.length);
  const length = ip.length;
  ip.set([0x45, 0, length >>> 8, length, 0, 0, 0, 0, 64, IpProtocol.udp]);
  ip.set([10, 0, 0, 1, 10, 0, 0, 2], Ipv4.source);
  const udp = length - Ipv4.minLength;
  ip.set([udp >>> 8, udp], Ipv4.minLength + Udp.udpLength);
  return frame;
}

/** The driver and the device, with a burst of frames of `size` bytes. */
function workload(size: number, secured: boolean, unit: 'mpps' | 'gbps'): Workload {
  const arena = new Arena();
  const pool = makePool(arena, 4096, maxFrameOf(MTU));
  const { fn, device } = makeFunction({
    ...{ arena, pool, link: loopbackLink(pool), queuePairs: 1, wire: REVISION, ipsec: true },
    ...{ mac: Uint8Array.of(2, 0, 0, 0, 0, 1), mtu: MTU, faults: NO_FAULTS, wake: () => {} },
  });
  const guest = new Guest(fn);
  const layout = netHeaderLayout(FEATURES, REVISION);
  const packets = new PacketPool(guest.allocate(PACKETS * SLOT));
  const make = (index: number) => {
    const { iovaLow, iovaHigh } = packets;
    const options = { index, size: RING, iovaLow, iovaHigh, headroom: layout.length };
    return new SplitVirtqueue(guest.allocate(virtqueueBytes('split', options)), options);
  };
  const [rxRing, txRing] = [make(0), make(1)];
  initialize(fn, FEATURES, [rxRing, txRing]);
  const sas = createSaTable(16, 16);
  if (secured) {
    secure(device);
    sas.resourceId[SA_HANDLE] = OBJECT;
    sas.handle[OBJECT] = SA_HANDLE;
  }
  const common = { notifier: { notify() {} }, pool: packets, layout, sas };
  const rx = new RxQueue({ ...common, queue: rxRing });
  const tx = new TxQueue({ ...common, queue: txRing, maxLength: MTU });
  rx.refill();
  const burst = new Uint32Array(BURST);
  packets.allocate(burst, BURST);
  const frame = udpFrame(size);
  for (const p of burst) {
    packets.write(p, frame);
    packets.sa[p] = secured ? SA_HANDLE : 0;
  }
  const round = () => {
    // hot: what was received is sent again; its SA is the one that it came with.
    if (tx.burst(burst, BURST) !== BURST) throw new Error('the transmit queue is full');
    device.poll();
    let got = 0;
    for (let i = 0; got < BURST && i < 4; i++) got += rx.burst(burst, BURST - got);
    if (got !== BURST) throw new Error(`${got} packets came back: ${JSON.stringify(device.statistics())}`);
  };
  return {
    operations: BURST * BURSTS * (unit === 'mpps' ? 1e-6 : size * 8e-9),
    run: () => {
      for (let i = 0; i < BURSTS; i++) round();
    },
    close: () => {
      const last = burst[BURST - 1];
      if (packets.length[last] !== size || (packets.sa[last] === SA_HANDLE) !== secured) {
        throw new Error('packets were changed');
      }
      guest.close();
      fn.close();
      device.close();
      arena.close();
    },
  };
}

export const suite: BenchSuite = {
  name: 'device',
  *benchmarks() {
    yield rate('device.plain.64B.mpps', 'Mpps', () => workload(64, false, 'mpps'));
    yield rate('device.plain.1400B.gbps', 'Gbit/s', () => workload(1400, false, 'gbps'));
    yield rate('device.inline.64B.mpps', 'Mpps', () => workload(64, true, 'mpps'));
    yield rate('device.inline.1400B.gbps', 'Gbit/s', () => workload(1400, true, 'gbps'));
    yield rate('device.tcp_stream.gbps', 'Gbit/s', () => tcpStream(false, Slot.small));
    yield rate('device.tcp_stream_tso.gbps', 'Gbit/s', () => tcpStream(true, Slot.large));
    yield rate('device.tcp_stream_tso.small_slots.gbps', 'Gbit/s', () => tcpStream(true, Slot.small));
    const tso = ratio(
      'device.tso.ratio',
      () => tcpStream(true, Slot.large),
      () => tcpStream(false, Slot.small),
    );
    yield { ...tso, goal: 3 };
  },
};
