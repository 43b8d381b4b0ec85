/** A manager with a device in memory and the real software side, and packets through both. */
import { VirtioError } from '../../src/errors.ts';
import { SoftwareIpsec } from '../../src/fallback/software.ts';
import { Verdict } from '../../src/fallback/verdict.ts';
import { InboundRules } from '../../src/ipsec/inbound-rules.ts';
import { InlineIpsec, type MutableSaTable } from '../../src/ipsec/inline.ts';
import { IpsecManager } from '../../src/ipsec/manager.ts';
import { NonceGuard, NonceMemory } from '../../src/ipsec/nonce-guard.ts';
import type { Where } from '../../src/ipsec/placement.ts';
import type { SecurityAssociation } from '../../src/ipsec/sa.ts';
import { SaPlace } from '../../src/ipsec/sa-state.ts';
import { ipsecWire } from '../../src/ipsec/wire/revisions.ts';
import { PacketPool } from '../../src/packet/pool.ts';
import { mapAnonymous } from '../../src/sys/memory.ts';
import type { WireRevision } from '../../src/virtio/revision.ts';
import { FlowFilter } from '../../src/virtio-net/flow-filter.ts';
import type { FakeAdmin } from '../virtio-net/fake-admin.ts';
import { ipsecDevice } from './fake-device.ts';

/** A packet that went out: through the device, `bytes` are the object that it has; else they are the packet. */
export interface Evidence {
  readonly where: Where;
  readonly iv: bigint;
  readonly bytes: Uint8Array;
}

const IDS = [0x800, 0x801, 0x802, 0x803, 0x804];

export interface MoveSetup {
  readonly admin: FakeAdmin;
  readonly manager: IpsecManager;
  readonly pool: PacketPool;
  readonly table: MutableSaTable;
  readonly memory: NonceMemory;
  /** Sequence number and explicit IV of each packet that was sent. */
  readonly sent: { handle: number; where: Where; sequence: bigint; iv: bigint }[];
  /**
   * Sends `n` packets as the transmit queue would; returns the verdicts. The device in memory begins with 1, or with the object's `esn`,
   * whenever it is given an object, new or modified, and uses the sequence number as IV: what is worst for nonces.
   */
  send(handle: number, n: number): number[];
  /** Has the software side open a packet of the peer's SA `peer`, with sequence number `sequence`; returns the verdict. */
  receive(peer: SecurityAssociation, sequence: bigint): number;
}

/** All pools lie in the same memory: only the last one that was opened is in use. */
const packetMemory = mapAnonymous(64 * 2048);
const endings: (() => void)[] = [];

/** Ends what was opened; belongs into an `afterEach`. */
export function closeMoves(): void {
  for (const end of endings.splice(0)) end();
}

export async function openForMoves(
  revision: WireRevision = 'virtio-1.4',
  guard?: NonceGuard,
  onSent: (evidence: Evidence) => void = () => {},
): Promise<MoveSetup> {
  const pool = new PacketPool(packetMemory);
  const admin = ipsecDevice({ inbound: 8, outbound: 8 }, revision);
  const filter = await FlowFilter.open(admin, IDS);
  const table: MutableSaTable = { resourceId: new Uint32Array(0), handle: new Uint32Array(0) };
  const inline = await InlineIpsec.open(admin, IDS, {
    wire: ipsecWire(revision),
    rules: filter === null ? null : new InboundRules(filter),
    table,
    handles: 8,
    maxSas: 8,
    quiesceTransmit: async () => true,
    receiveQueues: 0,
  });
  const memory = new NonceMemory();
  const manager = new IpsecManager({
    inline,
    inlineObstacle: null,
    software: (onEvent) => new SoftwareIpsec(pool, { engine: 'noble', onEvent }),
    guard: guard ?? new NonceGuard({ memory }),
    mtu: 1500,
    handles: 8,
  });
  const sent: MoveSetup['sent'] = [];
  const packets = new Uint32Array(1);
  const verdicts = new Uint8Array(1);
  const throughSoftware = (handle: number): number => {
    pool.allocate(packets, 1);
    const [p] = packets;
    pool.write(p, ipPacket());
    pool.sa[p] = handle;
    manager.software?.protect(packets, 1, 0, verdicts);
    if (verdicts[0] === Verdict.ok) {
      const bytes = Buffer.from(pool.read(p));
      const sequence = BigInt(bytes.readUInt32BE(24));
      const iv = bytes.readBigUInt64BE(28);
      sent.push({ handle, where: 'software', sequence, iv });
      onSent({ where: 'software', iv, bytes });
    }
    pool.free(packets, 1);
    return verdicts[0];
  };
  const counters = new WeakMap<object, bigint>();
  const throughDevice = (handle: number): number => {
    const { state } = manager;
    state.count(handle, 1, 28);
    const due = state.packetsUntilAlert(handle) <= 0 || state.bytesUntilAlert(handle) <= 0;
    const verdict = due ? state.check(handle, 28) : Verdict.ok;
    const object = admin.objects.get(`0x203/${table.resourceId[handle]}`);
    if (verdict !== Verdict.ok || object === undefined) return verdict;
    const { esn } = ipsecWire(revision).decodeSa(object.bytes);
    const sequence = counters.get(object) ?? (esn === 0n ? 1n : esn);
    counters.set(object, sequence + 1n);
    sent.push({ handle, where: 'inline', sequence, iv: sequence });
    onSent({ where: 'inline', iv: sequence, bytes: object.bytes });
    return verdict;
  };
  const one = (handle: number): number => {
    const place = manager.state.place[handle];
    if (place === SaPlace.inlineOutbound) return throughDevice(handle);
    return place === SaPlace.softwareOutbound ? throughSoftware(handle) : Verdict.noSa;
  };
  const send = (handle: number, n: number) => Array.from({ length: n }, () => one(handle));

  let peerSide: SoftwareIpsec | null = null;
  endings.push(() => {
    manager.close(new VirtioError('NIC_CLOSED', 'closed'));
    peerSide?.close();
  });
  const receive = (peer: SecurityAssociation, sequence: bigint): number => {
    peerSide ??= new SoftwareIpsec(pool, { engine: 'noble' });
    peerSide.add(1, { ...peer, direction: 'outbound', initial: { sequence } });
    pool.allocate(packets, 1);
    const [p] = packets;
    pool.write(p, ipPacket());
    pool.sa[p] = 1;
    peerSide.protect(packets, 1, 0, verdicts);
    peerSide.remove(1);
    pool.sa[p] = 0;
    manager.software?.unprotect(packets, 1, 0, verdicts);
    pool.free(packets, 1);
    return verdicts[0];
  };
  return { admin, manager, pool, table, memory, sent, send, receive };
}

/** An IPv4 packet of 28 bytes. */
export function ipPacket(): Uint8Array {
  return Buffer.from('4500001c00000000401100000a0000010a0000020001000200080000', 'hex');
}
