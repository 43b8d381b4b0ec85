/**
 * Our driver in the guest, through kernel VFIO and the vIOMMU, on the IPsec function of the software device: capabilities,
 * SAs, flow filter, the extended header, resets. The device's link is a loop, so what it encrypts it must open again; whether
 * it is right is for Linux to say, in `inline-*.ts`.
 */
import {
  algorithmNames,
  Feature,
  modeName,
  type Nic,
  openFunction,
  openNic,
  type SaHandle,
  type SecurityAssociationInput,
} from '../../src/index.ts';
import { bindFunction } from '../../src/vfio/bind.ts';
import { poll } from '../bodies/frames.ts';
import { type Guest, mustFail, same } from '../guest/guest.ts';
import type { Scenario } from '../scenario.ts';

const PACKETS = 200;
const HEADER = 14;
const TIMEOUT_MS = 15_000;
const SPI = 0x2000;
const MODES = ['AH transport', 'AH tunnel', 'ESP transport', 'ESP tunnel'];

const Check = {
  features: 'IPSEC, ADMIN_VQ and all four feature words reach the driver in the guest',
  capability: 'the capabilities name modes and algorithms',
  sas: 'SAs are placed inline',
  traffic: 'packets leave under one SA and arrive under the other, with the header saying so',
  clear: 'a packet without an SA stays in the clear',
  query: 'the device keeps the SA, and its keys are not shown',
  nonce: 'the same key again is refused',
  flr: 'a function-level reset ends all SAs; a new driver starts from nothing',
  again: 'three times: open, SAs, traffic, close',
} as const;

export const scenario: Scenario = {
  title: 'our driver inline on the software device, through VFIO and the vIOMMU',
  machine: { qemu: 'vfioUser' },
  devices: [{ kind: 'vfio-user', id: 'nic', link: 'loopback' }],
  modules: ['virtio_pci', 'virtio_net', 'vfio_pci', 'vfio_iommu_type1'],
  timeout: 120,
  checks: Object.values(Check),

  async guest(guest) {
    const address = guest.address('nic');
    bindFunction(address);
    let nic = await openNic(address, { ipsec: 'inline' });
    await guest.check(Check.features, () => {
      const needed = [Feature.VERSION_1, Feature.ACCESS_PLATFORM, Feature.ADMIN_VQ, Feature.IPSEC];
      if (!nic.features.hasAll(...needed)) throw new Error(nic.features.names().join(' '));
      return nic.features.names().join(' ');
    });
    await guest.check(Check.capability, () => {
      const { inline } = nic.ipsec;
      if (inline === null) throw new Error(`${nic.ipsec.inlineObstacle}`);
      same('modes', inline.modes.map(({ mode }) => modeName(mode)).sort(), MODES);
      const names = inline.modes.map((entry) => Object.values(algorithmNames(entry)).flat().join(' '));
      if (names.some((list) => list === '')) throw new Error(`a mode without algorithms: ${names.join('; ')}`);
      return names[0];
    });
    const sas = await addPair(nic, 0);
    await guest.check(Check.sas, () =>
      same(
        'where',
        sas.map((sa) => sa.placement.where),
        ['inline', 'inline'],
      ),
    );
    await guest.check(Check.traffic, () => loop(nic, sas));
    await guest.check(Check.clear, () => loop(nic, undefined));
    await guest.check(Check.query, async () => {
      const object = await sas[0].query();
      same('SPI', object?.spi, SPI);
      const shown = JSON.stringify(object, (_, value) => (typeof value === 'bigint' ? String(value) : value));
      if (shown.includes(key(0).slice(0, 8))) throw new Error('the key is shown');
    });
    await guest.check(Check.nonce, () => mustFail('NONCE_REUSE', () => nic.ipsec.addSa(outbound(0, SPI + 99))));
    await nic.close();
    await guest.check(Check.flr, async () => {
      const fn = openFunction(address);
      fn.reset();
      fn.close();
      nic = await openNic(address, { ipsec: 'inline' });
      same('SAs', nic.ipsec.list().length, 0);
      await loop(nic, await addPair(nic, 1));
      await nic.close();
    });
    await repeat(guest, address);
  },
};

async function repeat(guest: Guest, address: string): Promise<void> {
  await guest.check(Check.again, async () => {
    for (let i = 2; i < 5; i++) {
      const nic = await openNic(address, { ipsec: 'inline' });
      await loop(nic, await addPair(nic, i));
      await nic.close();
    }
  });
}

/** A key of its own for each round: the guard refuses one that was used. */
function key(round: number): string {
  return (round + 0x5a).toString(16).padStart(2, '0').repeat(16);
}

function outbound(round: number, spi: number): SecurityAssociationInput {
  return {
    direction: 'outbound',
    mode: 'tunnel',
    spi,
    aead: { name: 'aes-gcm', key: key(round), salt: 'a1b2c3d4' },
    tunnel: { source: '192.0.2.1', destination: '192.0.2.2' },
  };
}

/** An outbound SA and the inbound one that opens what it protects. */
async function addPair(nic: Nic, round: number): Promise<[SaHandle, SaHandle]> {
  const out = outbound(round, SPI + round);
  return [await nic.ipsec.addSa(out), await nic.ipsec.addSa({ ...out, direction: 'inbound' })];
}

/** Sends UDP packets of all sizes and expects each back as it was, under the inbound SA or (without SAs) in the clear. */
async function loop(nic: Nic, sas: readonly [SaHandle, SaHandle] | undefined): Promise<string> {
  const { packets, queues } = nic;
  const [{ rx, tx }] = queues;
  const one = new Uint32Array(1);
  const burst = new Uint32Array(64);
  let sent = 0;
  let received = 0;
  await poll(
    () => {
      if (nic.broken !== null) throw nic.broken;
      tx.reclaim();
      if (sent < PACKETS && sent - received < burst.length && packets.allocate(one, 1) === 1) {
        packets.write(one[0], udpPacket(sent));
        packets.sa[one[0]] = sas?.[0].handle ?? 0;
        if (tx.burst(one, 1) === 1) sent++;
        else packets.free(one, 1);
      }
      const n = rx.burst(burst, burst.length);
      for (let i = 0; i < n; i++) {
        const frame = packets.read(burst[i]);
        same(`SA of packet ${received}`, packets.sa[burst[i]], sas?.[1].handle ?? 0);
        if (!Buffer.from(frame).equals(udpPacket(received))) throw new Error(`packet ${received} came back changed`);
        received++;
      }
      packets.free(burst, n);
      return received === PACKETS;
    },
    TIMEOUT_MS,
    `the loop (${sas === undefined ? 'in the clear' : 'inline'})`,
  );
  return `${received} packets`;
}

/** An Ethernet frame with IPv4 and UDP (no checksum), of a size that depends on `index`. */
function udpPacket(index: number): Uint8Array {
  const payload = (index * 37) % 1300;
  const frame = Buffer.alloc(HEADER + 28 + payload, index & 0xff);
  frame.set([0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2, 0x08, 0x00]);
  const ip = frame.subarray(HEADER);
  ip.set([0x45, 0, 0, 0, index >> 8, index & 0xff, 0, 0, 64, 17, 0, 0, 10, 1, 0, 1, 10, 2, 0, 1]);
  ip.writeUInt16BE(28 + payload, 2);
  let sum = 0;
  for (let i = 0; i < 20; i += 2) sum += ip.readUInt16BE(i);
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
  ip.writeUInt16BE(~sum & 0xffff, 10);
  ip.writeUInt16BE(4000, 20);
  ip.writeUInt16BE(5000, 22);
  ip.writeUInt16BE(8 + payload, 24);
  ip.writeUInt16BE(0, 26);
  return frame;
}
