import { writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, describe, expect, it } from 'vitest';
import type { FaultName } from '../../src/device/index.ts';
import { type NicOptions, WIRE_REVISIONS } from '../../src/index.ts';
import {
  capture,
  cleanUp,
  directory,
  freshKey,
  open,
  openPair,
  receive,
  saPair,
  send,
  startDevice,
  until,
} from './support.ts';

afterEach(cleanUp);

const code = (name: string) => expect.objectContaining({ code: name });
const quick: NicOptions = { resetTimeout: 300, commandTimeout: 300 };

describe('opening something that is not the device it should be', () => {
  it('fails with a code when there is no such socket, or something else is there', async () => {
    const at = directory();
    await expect(open(`vfio-user:${join(at, 'nobody.sock')}`)).rejects.toThrow(code('CONNECT_FAILED'));
    writeFileSync(join(at, 'file'), '');
    await expect(open(`vfio-user:${join(at, 'file')}`)).rejects.toThrow(code('CONNECT_FAILED'));
    await expect(open('eth0')).rejects.toThrow(code('DEVICE_ADDRESS'));
    await expect(open('vfio-user:')).rejects.toThrow(code('DEVICE_ADDRESS'));
  });

  it('fails with a code when nobody answers behind the socket', async () => {
    // A listener in this very process cannot answer, because opening a device blocks: what a stuck server looks like.
    const path = join(directory(), 'silent.sock');
    const server = createServer();
    await new Promise<void>((resolve) => server.listen(path, resolve));
    try {
      await expect(open(`vfio-user:${path}`)).rejects.toThrow(code('NOT_VFIO_USER'));
    } finally {
      server.close();
    }
  });

  it('fails with a code when the options make no sense', async () => {
    for (const options of [{ queueSize: 100 }, { queuePairs: 0 }, { mtu: 10 }, { packetStride: 2000 }, { maxSas: 0 }]) {
      await expect(open('vfio-user:/nowhere', options)).rejects.toThrow(code('NIC_OPTION'));
    }
  });

  it.each<[FaultName, string]>([
    ['no-version-1', 'FEATURES_MISSING'],
    ['features-ok-refused', 'FEATURES_REJECTED'],
    ['reset-stuck', 'RESET_TIMEOUT'],
    ['needs-reset-at-start', 'DEVICE_NEEDS_RESET'],
    ['capability-loop', 'CAPABILITY_LOOP'],
    ['capability-outside-config', 'CAPABILITY_BOUNDS'],
    ['capability-outside-bar', 'STRUCTURE_BOUNDS'],
    ['capability-bad-bar', 'STRUCTURE_MISSING'],
    ['no-common-config', 'STRUCTURE_MISSING'],
    ['queue-size-zero', 'QUEUE_SIZE'],
    ['queue-size-odd', 'QUEUE_SIZE'],
    ['notify-outside-bar', 'STRUCTURE_BOUNDS'],
    ['config-unstable', 'CONFIG_UNSTABLE'],
    ['region-read-error', 'DEVICE_REFUSED'],
  ])('fails with a code when the device has the fault %s', async (fault, expected) => {
    const device = await startDevice({ faults: [fault] });
    await expect(open(device.addresses[0], quick)).rejects.toThrow(code(expected));
    // It is still there.
    expect(await device.statistics()).toHaveLength(1);
  });
});

describe.each(WIRE_REVISIONS)('opening a device for inline IPsec on %s', (wire) => {
  it.each<[FaultName, string]>([
    ['admin-error', 'ADMIN_ENOMEM'],
    ['admin-silent', 'ADMIN_TIMEOUT'],
    ['admin-list-empty', 'ADMIN_COMMANDS_MISSING'],
    ['admin-short-reply', 'ADMIN_COMMANDS_MISSING'],
    ['capability-malformed', 'MALFORMED_CAPABILITY'],
  ])('fails with a code when inline IPsec is required and the device has the fault %s', async (fault, expected) => {
    const device = await startDevice({ faults: [fault], wire });
    await expect(open(device.addresses[0], { ...quick, wire, ipsec: 'inline' })).rejects.toThrow(code(expected));
  });

  it('fails with a code when inline IPsec is required of a device without', async () => {
    const device = await startDevice({ ipsec: false, wire });
    await expect(open(device.addresses[0], { wire, ipsec: 'inline' })).rejects.toThrow(code('FEATURES_MISSING'));
    await expect(open(device.addresses[0], { wire, ipsec: 'inline' })).rejects.toThrow(/VIRTIO_NET_F_IPSEC/);
    await open(device.addresses[0], { wire });
  });
});

describe.each(WIRE_REVISIONS)('a device of %s whose inline IPsec cannot be used', (wire) => {
  it.each<FaultName>(['admin-error', 'admin-silent', 'admin-list-empty', 'admin-short-reply', 'capability-malformed'])(
    'protects in software instead, and nothing leaves in clear, with the fault %s',
    async (fault) => {
      const pair = await openPair({ faults: [fault], nic: quick, wire }, { ipsec: false, wire });
      const { a, b } = pair;
      const { outbound, inbound } = saPair();
      const out = await a.ipsec.addSa(outbound);
      expect(out.placement.where).toBe('software');
      expect(out.placement.because).toBe(a.ipsec.inlineObstacle);
      await expect(a.ipsec.addSa(saPair().outbound, { require: 'inline' })).rejects.toThrow(code('NOT_OFFLOADABLE'));
      await b.ipsec.addSa(inbound);
      const frames = capture('ping-ipv4').filter((frame) => frame.readUInt16BE(12) === 0x0800);
      const [, received] = await Promise.all([send(a, frames, out), receive(b, frames.length)]);
      expect(received.map(({ frame }) => frame)).toEqual(frames);
      expect(pair.wire.frames.every(({ frame }) => frame[14 + 9] === 50)).toBe(true);
    },
  );
});

describe.each(WIRE_REVISIONS)('a device of %s that reads the standard otherwise', (wire) => {
  it.each<{ faults: FaultName[] }>([{ faults: [] }, { faults: ['query-modify-swapped'] }])(
    'queries and modifies SAs with the opcodes that it means, with the faults $faults',
    async ({ faults }) => {
      const device = await startDevice({ faults, wire });
      const nic = await open(device.addresses[0], { wire });
      const { outbound, inbound } = saPair();
      const out = await nic.ipsec.addSa(outbound);
      const inn = await nic.ipsec.addSa(inbound);
      expect(await out.query()).toMatchObject({ spi: out.spi, direction: 1, cipherKeyLength: 16, replayWindow: 0 });
      await inn.modify({ ...inbound, replayWindow: 1024 });
      expect(await inn.query()).toMatchObject({ spi: inn.spi, direction: 2, replayWindow: 1024 });
      await out.modify({ ...outbound, aead: { name: 'aes-gcm', key: freshKey(32), salt: '05060708' } });
      expect(await out.query()).toMatchObject({ spi: out.spi, cipherKeyLength: 32 });
      await expect(out.modify(outbound)).rejects.toThrow(code('NONCE_REUSE'));
    },
  );
});

describe('a device that breaks the rules of a ring', () => {
  it.each<['split' | 'packed', FaultName, string]>([
    ['split', 'used-id-bogus', 'USED_ID'],
    ['split', 'used-id-twice', 'USED_ID'],
    ['split', 'used-length-too-long', 'USED_LENGTH'],
    ['split', 'used-index-jump', 'USED_INDEX'],
    ['packed', 'used-id-bogus', 'USED_ID'],
    ['packed', 'used-id-twice', 'USED_ID'],
    ['packed', 'used-length-too-long', 'USED_LENGTH'],
    // There is no index: the same buffer is returned again and again.
    ['packed', 'used-index-jump', 'USED_ID'],
  ])(
    'leaves a NIC that says so and bursts that give 0, with %s rings and the fault %s',
    async (ring, fault, expected) => {
      const device = await startDevice({ faults: [fault] });
      // Without interrupts, by which a device that has confused itself might ask for a reset first.
      const nic = await open(device.addresses[0], { ...quick, ipsec: 'off', ring, interrupts: false });
      const told: string[] = [];
      nic.onBroken((error) => told.push(error.code));
      const packets = new Uint32Array(32);
      const [{ rx, tx }] = nic.queues;
      // The data path alone finds out: nobody asks `nic.broken`.
      const deadline = performance.now() + 20_000;
      while (told.length === 0 && performance.now() < deadline) {
        const n = nic.packets.allocate(packets, 8);
        for (let k = 0; k < n; k++) nic.packets.write(packets[k], capture('ping-ipv4')[0]);
        const taken = tx.burst(packets, n);
        nic.packets.free(packets.subarray(taken), n - taken);
        await sleep(2);
        nic.packets.free(packets, rx.burst(packets, 32));
      }
      expect(nic.broken).toEqual(code(expected));
      expect(rx.burst(packets, 32)).toBe(0);
      const n = nic.packets.allocate(packets, 4);
      expect(tx.burst(packets, n)).toBe(0);
      await expect(nic.ipsec.addSa(saPair().outbound)).rejects.toThrow(code(expected));
      expect(told).toEqual([expected]);
    },
  );

  it('may write what it likes to a field that means nothing without mergeable buffers', async () => {
    const device = await startDevice({ faults: ['rx-buffers-zero'] });
    const nic = await open(device.addresses[0]);
    const frames = capture('ping-ipv4');
    const [, received] = await Promise.all([send(nic, frames, null), receive(nic, frames.length)]);
    expect(received.map(({ frame }) => frame)).toEqual(frames);
  });

  it.each(['split', 'packed'] as const)(
    'may forget to ask for notifications: it is notified when nothing comes back, %s',
    async (ring) => {
      const device = await startDevice({ faults: ['notifications-unasked'] });
      const nic = await open(device.addresses[0], { ring, queueSize: 32 });
      const [frame] = capture('ping-ipv4');
      const deadline = performance.now() + 20_000;
      // As often as it takes to find the device asleep.
      while (nic.statistics().tx.renotified === 0) {
        expect(performance.now(), 'the device never slept').toBeLessThan(deadline);
        await send(nic, [frame], null);
        expect((await receive(nic, 1)).map(({ frame: got }) => got)).toEqual([frame]);
        await sleep(50);
      }
    },
  );

  it('may keep what was sent for ever: then bursts take less, and closing gives everything back', async () => {
    const device = await startDevice({ faults: ['tx-never-completes'] });
    const nic = await open(device.addresses[0], { queueSize: 32 });
    const packets = new Uint32Array(64);
    let taken = 0;
    for (let i = 0; i < 4; i++) {
      const n = nic.packets.allocate(packets, 16);
      for (let k = 0; k < n; k++) nic.packets.write(packets[k], capture('ping-ipv4')[0]);
      taken += nic.queues[0].tx.burst(packets, n);
    }
    expect(taken).toBe(32);
    expect(nic.statistics().tx.ringFull).toBeGreaterThan(0);
    await nic.close();
  });
});

describe.each(WIRE_REVISIONS)('a device of %s that lies about packets', (wire) => {
  it('is not believed when it calls an unprotected packet secured', async () => {
    const device = await startDevice({ faults: ['rx-security-lie'], wire });
    const nic = await open(device.addresses[0], { wire });
    const frames = capture('ping-ipv4');
    const [, received] = await Promise.all([send(nic, frames, null), receive(nic, frames.length)]);
    expect(received.length).toBeGreaterThan(0);
    expect(received.every(({ sa, flags }) => sa === 0 && (flags & 4) === 0)).toBe(true);
    expect(nic.statistics().rx.unknownSa).toBeGreaterThan(0);
  });

  it('has its packets without a whole header dropped', async () => {
    const device = await startDevice({ faults: ['rx-runt'], wire });
    const nic = await open(device.addresses[0], { wire });
    await send(nic, capture('ping-ipv4'), null);
    const packets = new Uint32Array(32);
    const dropped = () => nic.queues[0].rx.burst(packets, 32) === 0 && nic.statistics().rx.invalid > 0;
    await until(dropped, () => 'nothing was dropped');
    expect(nic.statistics().rx.packets).toBe(0);
    expect(nic.broken).toBeNull();
  });
});
