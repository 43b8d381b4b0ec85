import { spawn } from 'node:child_process';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, describe, expect, it } from 'vitest';
import type { FaultName } from '../../src/device/index.ts';
import { openNic, WIRE_REVISIONS } from '../../src/index.ts';
import {
  capture,
  cleanUp,
  open,
  receive,
  saPair,
  send,
  spawnDevice,
  spawnPair,
  startDevice,
  until,
} from './support.ts';

afterEach(cleanUp);

const gone = expect.objectContaining({ code: 'DEVICE_GONE' });
const ip = capture('http-ipv4').filter((frame) => frame.readUInt16BE(12) === 0x0800);

describe('a device that dies in the middle', () => {
  it.each(WIRE_REVISIONS)(
    'leaves a NIC that says so, bursts that give 0, calls that reject, and nothing in clear on the wire of %s',
    async (revision) => {
      const { a, b, deviceA, wire } = await spawnPair({ wire: revision }, { ipsec: false });
      const { outbound, inbound } = saPair();
      const out = await a.ipsec.addSa(outbound);
      await b.ipsec.addSa(inbound);
      const told: string[] = [];
      a.onBroken((error) => told.push(error.code));
      const traffic = (async () => {
        for (let i = 0; i < 1000 && a.broken === null; i++) await send(a, ip, out);
      })();
      await until(
        () => wire.frames.length > 200,
        () => 'no traffic',
      );
      // A device that hangs and is killed a little later, while the driver waits for its answer.
      spawn('sh', ['-c', `sleep 0.3; kill -9 ${deviceA.process.pid}`], { stdio: 'ignore' });
      deviceA.process.kill('SIGSTOP');
      await expect(a.ipsec.addSa(saPair().outbound)).rejects.toThrow(gone);
      await until(
        () => a.broken !== null,
        () => 'the NIC did not notice',
      );
      await traffic;
      await sleep(0);
      expect(a.broken).toEqual(gone);
      expect(told).toEqual(['DEVICE_GONE']);
      const packets = new Uint32Array(32);
      expect(a.queues[0].rx.burst(packets, 32)).toBe(0);
      expect(a.queues[0].tx.burst(packets, a.packets.allocate(packets, 4))).toBe(0);
      await expect(a.ipsec.addSa(saPair().outbound)).rejects.toThrow(gone);
      await expect(out.modify(saPair({ spi: out.spi }).outbound)).rejects.toThrow(gone);
      await out.remove();
      expect(() => a.link).toThrow(gone);
      expect(wire.frames.every(({ frame }) => frame[14 + 9] === 50)).toBe(true);
      await a.close();
      await receive(b, 0);
      expect(b.broken).toBeNull();
    },
  );

  it('lets a command that waits for its answer reject at once', async () => {
    const device = await spawnDevice({ faults: ['admin-silent'] });
    const opening = openNic(device.addresses[0], { ipsec: 'inline', commandTimeout: 60_000 });
    const rejects = expect(opening).rejects.toThrow(gone);
    await sleep(300);
    const killed = performance.now();
    await device.kill();
    await rejects;
    // Long before its own time is up.
    expect(performance.now() - killed).toBeLessThan(20_000);
  });

  it.each<FaultName>(['dies-after-start', 'dies-on-traffic'])(
    'is noticed without anybody asking, with the fault %s',
    async (fault) => {
      const device = await spawnDevice({ faults: [fault] });
      const nic = await openNic(device.addresses[0]).catch((error: unknown) => {
        expect(error).toEqual(gone);
        return null;
      });
      if (nic === null) return;
      const told = new Promise((resolve) => nic.onBroken(resolve));
      if (fault === 'dies-on-traffic')
        await send(
          nic,
          Array.from({ length: 300 }, (_, i) => ip[i % ip.length]),
          null,
        );
      expect(await told).toEqual(gone);
      await nic.close();
    },
  );

  it('lets its NIC be closed and another device be opened', async () => {
    const device = await spawnDevice();
    const nic = await open(device.addresses[0]);
    await device.kill();
    await nic.close();
    await nic.close();
    const next = await startDevice();
    const again = await open(next.addresses[0]);
    expect(again.broken).toBeNull();
  });
});

describe('a NIC that is closed', () => {
  it.each(WIRE_REVISIONS)('leaves a device of %s that can be opened again, with none of the old SAs', async (wire) => {
    const device = await startDevice({ wire });
    for (let i = 0; i < 3; i++) {
      const nic = await open(device.addresses[0], { wire });
      const sa = await nic.ipsec.addSa(saPair().outbound);
      expect(sa.placement.where).toBe('inline');
      expect((await sa.query())?.objectId).toBe(0);
      await nic.close();
      expect(nic.queues[0].rx.burst(new Uint32Array(4), 4)).toBe(0);
      await expect(nic.ipsec.addSa(saPair().inbound)).rejects.toThrow(expect.objectContaining({ code: 'NIC_CLOSED' }));
    }
    expect(await device.statistics()).toHaveLength(1);
  });

  it('does so by itself at the end of its block', async () => {
    const device = await startDevice();
    let nic: Awaited<ReturnType<typeof openNic>>;
    {
      await using inner = await openNic(device.addresses[0]);
      nic = inner;
      expect(nic.broken).toBeNull();
    }
    expect(nic.broken).toEqual(expect.objectContaining({ code: 'NIC_CLOSED' }));
    await open(device.addresses[0]);
  });

  it('gives up what waits', async () => {
    const device = await startDevice({ faults: ['admin-silent'] });
    const opening = openNic(device.addresses[0], { commandTimeout: 200 });
    const nic = await opening;
    expect(nic.ipsec.inlineObstacle).toMatch(/ADMIN_TIMEOUT/);
    await nic.close();
  });
});
