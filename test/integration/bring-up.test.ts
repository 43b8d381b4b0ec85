import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';
import { Feature, PacketFlag, WIRE_REVISIONS } from '../../src/index.ts';
import {
  capture,
  cleanUp,
  directory,
  freshKey,
  isProtected,
  open,
  receive,
  saPair,
  send,
  startDevice,
  until,
} from './support.ts';

afterEach(cleanUp);

const frames = capture('http-ipv4');

describe('a NIC that is opened', () => {
  it('has negotiated what it needs and knows the device', async () => {
    const device = await startDevice();
    const nic = await open(device.addresses[0]);
    expect(nic.features.hasAll(Feature.VERSION_1, Feature.IPSEC, Feature.ADMIN_VQ)).toBe(true);
    expect(nic.mac).toHaveLength(6);
    expect(nic.mac[0] & 1).toBe(0);
    expect(nic.mtu).toBe(1500);
    expect(nic.link.up).toBe(true);
    expect(nic.broken).toBeNull();
    expect(nic.ipsec.inlineObstacle).toBeNull();
    expect(nic.ipsec.inline?.modes.map(({ mode }) => mode)).toEqual([1, 2, 3, 4]);
    expect(nic.flowFilter?.capabilities.actions).toContain(3);
    expect(nic.queues).toHaveLength(1);
    expect(nic.statistics().tx).toEqual({ packets: 0, bytes: 0, invalid: 0, ringFull: 0, renotified: 0, dropped: {} });
  });

  it('asks for no more than the IPsec mode wants', async () => {
    const device = await startDevice();
    for (const ipsec of ['software', 'off'] as const) {
      const nic = await open(device.addresses[0], { ipsec });
      expect(nic.features.hasAny(Feature.IPSEC, Feature.ADMIN_VQ)).toBe(false);
      expect(nic.ipsec.inlineObstacle).toBe('inline IPsec is not wanted');
      expect(nic.flowFilter).toBeNull();
      const adding = nic.ipsec.addSa(saPair().outbound);
      if (ipsec === 'off') await expect(adding).rejects.toThrow(expect.objectContaining({ code: 'NO_PLACE_FOR_SA' }));
      else expect((await adding).placement.where).toBe('software');
      await nic.close();
    }
  });

  it('gives back what it sends over a loop, byte for byte, and every packet to the pool', async () => {
    const device = await startDevice();
    const nic = await open(device.addresses[0], { queueSize: 64 });
    const idle = nic.packets.available;
    const [, received] = await Promise.all([send(nic, frames, null), receive(nic, frames.length)]);
    expect(received.map(({ frame }) => frame)).toEqual(frames);
    expect(received.every(({ sa, flags }) => sa === 0 && (flags & PacketFlag.secured) === 0)).toBe(true);
    nic.queues[0].tx.reclaim();
    expect(nic.packets.available).toBeLessThanOrEqual(idle + 32);
    expect(nic.packets.available).toBeGreaterThanOrEqual(idle - 32);
    expect(nic.statistics().rx.packets).toBe(frames.length);
    expect(nic.statistics().tx.packets).toBe(frames.length);
  });

  it('uses as many queue pairs as it is told to, and no more than there are', async () => {
    const device = await startDevice({ queuePairs: 4 });
    const nic = await open(device.addresses[0], { queuePairs: 3, queueSize: 64 });
    expect(nic.queues).toHaveLength(3);
    const packets = new Uint32Array(8);
    for (const { tx } of nic.queues) {
      const n = nic.packets.allocate(packets, 4);
      for (let i = 0; i < n; i++) nic.packets.write(packets[i], frames[i]);
      expect(tx.burst(packets, n)).toBe(4);
    }
    let got = 0;
    const deadline = performance.now() + 5000;
    while (got < 12 && performance.now() < deadline) {
      for (const { rx } of nic.queues) {
        const n = rx.burst(packets, 8);
        nic.packets.free(packets, n);
        got += n;
      }
      await new Promise((resolve) => setTimeout(resolve, 1));
    }
    expect(got).toBe(12);
    await nic.close();
    await expect(open(device.addresses[0], { queuePairs: 5 })).rejects.toThrow(
      expect.objectContaining({ code: 'QUEUE_PAIRS' }),
    );
    const single = await startDevice();
    await expect(open(single.addresses[0], { queuePairs: 2 })).rejects.toThrow(
      expect.objectContaining({ code: 'FEATURES_MISSING' }),
    );
  });

  it('steers with flow filter rules of the application, before and beside those of SAs', async () => {
    const device = await startDevice({ queuePairs: 2 });
    const nic = await open(device.addresses[0], { queuePairs: 2 });
    const filter = nic.flowFilter;
    if (filter === null) throw new Error('no flow filter');
    const group = await filter.addGroup(0xf000);
    const toServer = { ipv4: {}, tcp: { destinationPort: 80 } };
    const drop = await filter.addRule({ group, match: toServer, action: 'drop' });
    const http = frames.filter((frame) => frame.readUInt16BE(12) === 0x0800 && frame.readUInt16BE(36) === 80);
    expect(http.length).toBeGreaterThan(0);
    await send(nic, http, null);
    expect(await receive(nic, 0, 50)).toEqual([]);
    await filter.removeRule(drop);
    await filter.addRule({ group, match: toServer, action: { queue: 1 } });
    await send(nic, http, null);
    expect(await receive(nic, 0, 50)).toEqual([]);
    const packets = new Uint32Array(64);
    expect(nic.queues[1].rx.burst(packets, 64)).toBe(http.length);
  });

  it('remembers nonces in a file for the next process', async () => {
    const device = await startDevice();
    const nonceFile = join(directory(), 'nonces');
    const nic = await open(device.addresses[0], { nonceFile });
    const { outbound } = saPair({ aead: { name: 'aes-gcm', key: freshKey(), salt: '0a0b0c0d' } });
    await nic.ipsec.addSa(outbound);
    await nic.close();
    expect(readFileSync(nonceFile, 'latin1')).toMatch(
      /^vipsec-nonce-guard 1 [0-9a-f]{64} \.\n\nclaim [0-9a-f ]+\.\n\nfree [0-9a-f ]+\.\n$/,
    );
    const again = await open(device.addresses[0], { nonceFile });
    await expect(again.ipsec.addSa(outbound)).rejects.toThrow(expect.objectContaining({ code: 'NONCE_REUSE' }));
  });
});

describe('the wire revision', () => {
  it('is found out, when it is not given', async () => {
    for (const wire of WIRE_REVISIONS) {
      const device = await startDevice({ wire });
      const nic = await open(device.addresses[0], { wire: 'auto', ipsec: 'inline' });
      expect(nic.ipsec.inline?.wire.revision).toBe(wire);
      expect(nic.features.has(Feature.OUT_NET_HEADER)).toBe(wire === 'virtio-1.4');
      const sa = await nic.ipsec.addSa(saPair().outbound);
      expect(await sa.query()).toMatchObject({ spi: sa.spi });
    }
    const plain = await startDevice({ ipsec: false });
    const nic = await open(plain.addresses[0], { wire: 'auto' });
    expect(nic.ipsec.inlineObstacle).toBe('the device does not offer VIRTIO_NET_F_IPSEC');
  });

  it('is not taken for another when it is given wrongly', async () => {
    for (const wire of WIRE_REVISIONS) {
      const device = await startDevice({ wire });
      const other = WIRE_REVISIONS.find((one) => one !== wire) ?? wire;
      for (const ipsec of ['auto', 'inline'] as const) {
        await expect(open(device.addresses[0], { wire: other, ipsec })).rejects.toThrow(
          expect.objectContaining({ code: 'WIRE_REVISION' }),
        );
      }
      await open(device.addresses[0], { wire });
    }
  });

  it('limits what is expressible', async () => {
    const wire = 'rfc-2025-01';
    const device = await startDevice({ wire });
    const nic = await open(device.addresses[0], { wire });
    const limited = saPair({ lifetime: { hardPackets: 5 } });
    expect((await nic.ipsec.addSa(limited.outbound)).placement.because).toMatch(/does not offer SA lifetime/);
  });
});

describe('the place of the IP header', () => {
  it('is told on both ways with OUT_NET_HEADER, also behind a VLAN tag', async () => {
    const device = await startDevice();
    const nic = await open(device.addresses[0]);
    expect(nic.features.has(Feature.OUT_NET_HEADER)).toBe(true);
    const [plain] = frames.filter(isProtected);
    const arp = frames.find((frame) => frame.readUInt16BE(12) === 0x0806);
    const tagged = Buffer.concat([plain.subarray(0, 12), Buffer.of(0x81, 0x00, 0, 5), plain.subarray(12)]);
    if (arp === undefined) throw new Error('no ARP in the capture');
    await send(nic, [plain, tagged, arp], null);
    const packets = new Uint32Array(4);
    const said: number[] = [];
    await until(
      () => {
        const n = nic.queues[0].rx.burst(packets, 4);
        for (let i = 0; i < n; i++) said.push(nic.queues[0].rx.networkHeader(packets[i]));
        nic.packets.free(packets, n);
        return said.length === 3;
      },
      () => `${said.length} packets`,
    );
    expect(said).toEqual([14, 18, 0]);
  });
});
