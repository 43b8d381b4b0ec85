import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, describe, expect, it } from 'vitest';
import { Feature, type Nic } from '../../src/index.ts';
import { capture, cleanUp, open, receive, saPair, send, startDevice, until } from './support.ts';

afterEach(cleanUp);

const FORMATS = ['split', 'packed'] as const;
const frames = capture('http-ipv4').slice(0, 200);

const RING_FEATURES = [
  Feature.INDIRECT_DESC,
  Feature.EVENT_IDX,
  Feature.IN_ORDER,
  Feature.NOTIFICATION_DATA,
  Feature.NOTIF_CONFIG_DATA,
  Feature.ORDER_PLATFORM,
  Feature.RING_RESET,
];

const code = (expected: string) => expect.objectContaining({ code: expected });

/** Sends frames to a loopback device, and expects all of them back, in order. */
async function turn(nic: Nic): Promise<void> {
  const [, received] = await Promise.all([send(nic, frames, null), receive(nic, frames.length)]);
  expect(received).toHaveLength(frames.length);
  expect(received.every(({ frame }, i) => frame.equals(frames[i]))).toBe(true);
}

describe('the format of rings', () => {
  it.each([
    { rings: 'both', ring: 'auto', packed: true },
    { rings: 'both', ring: 'split', packed: false },
    { rings: 'both', ring: 'packed', packed: true },
    { rings: 'split', ring: 'auto', packed: false },
    { rings: 'packed', ring: 'auto', packed: true },
  ] as const)(
    'with a device that takes $rings and the option $ring is packed: $packed',
    async ({ rings, ring, packed }) => {
      const device = await startDevice({ rings });
      const nic = await open(device.addresses[0], { ring });
      expect(nic.features.has(Feature.RING_PACKED)).toBe(packed);
      expect(nic.features.hasAll(...RING_FEATURES)).toBe(true);
      await turn(nic);
      const sa = await nic.ipsec.addSa(saPair().outbound);
      expect(sa.placement.where).toBe('inline');
    },
  );

  it.each([
    { rings: 'split', ring: 'packed', expected: 'FEATURES_MISSING' },
    { rings: 'packed', ring: 'split', expected: 'FEATURES_REJECTED' },
  ] as const)('cannot be $ring with a device that takes $rings', async ({ rings, ring, expected }) => {
    const device = await startDevice({ rings });
    await expect(open(device.addresses[0], { ring })).rejects.toThrow(code(expected));
  });

  it('that does not exist is refused', async () => {
    await expect(open('vfio-user:/nowhere', { ring: 'round' as 'split' })).rejects.toThrow(code('NIC_OPTION'));
  });
});

describe.each(FORMATS)('%s rings', (ring) => {
  it('carry many frames around their ends, in order, and break no rule that the device watches', async () => {
    const device = await startDevice();
    const nic = await open(device.addresses[0], { ring, queueSize: 64 });
    for (let i = 0; i < 8; i++) await turn(nic);
    const [report] = await device.statistics();
    expect(report).toMatchObject({ violations: 0, failure: null });
  });

  it('are reset one at a time, while the other carries on, and work as before', async () => {
    const device = await startDevice();
    const nic = await open(device.addresses[0], { ring });
    const [queue] = nic.queues;
    const { available } = nic.packets;
    await turn(nic);
    for (const which of ['rx', 'tx', undefined] as const) {
      await queue.reset(which);
      expect(nic.broken).toBeNull();
      await turn(nic);
    }
    // No packet is lost, and none is free twice. The receive ring may lack a refill.
    await until(
      () => {
        queue.tx.reclaim();
        return nic.packets.available >= available && nic.packets.available < available + 32;
      },
      () => `${nic.packets.available} packets are free, not ${available}`,
    );
  });

  it('give 0 while they are reset, and a transmit queue sends while the receive queue is', async () => {
    const device = await startDevice();
    const nic = await open(device.addresses[0], { ring });
    const [queue] = nic.queues;
    await turn(nic);
    const packets = new Uint32Array(32);
    const resetting = queue.reset('rx');
    expect(queue.rx.burst(packets, 32)).toBe(0);
    expect(await send(nic, frames.slice(0, 20), null)).toBe(20);
    await resetting;
    const again = queue.reset('tx');
    const n = nic.packets.allocate(packets, 4);
    for (let i = 0; i < n; i++) nic.packets.write(packets[i], frames[i]);
    expect(queue.tx.burst(packets, n)).toBe(0);
    await again;
    expect(queue.tx.burst(packets, n)).toBe(n);
    const received = await receive(nic, n);
    expect(received.length).toBeGreaterThanOrEqual(n);
    expect(received.slice(-n).every(({ frame }, i) => frame.equals(frames[i]))).toBe(true);
  });

  it('of several pairs are reset without losing a frame of the others', async () => {
    const device = await startDevice({ queuePairs: 2 });
    const nic = await open(device.addresses[0], { ring, queuePairs: 2 });
    let running = true;
    const other = (async () => {
      while (running) {
        await nic.queues[1].reset();
        await sleep(1);
      }
    })();
    for (let i = 0; i < 3; i++) await turn(nic);
    running = false;
    await other;
    expect(nic.broken).toBeNull();
  });

  it('of a NIC that is closed while one of them is reset end like any other', async () => {
    const device = await startDevice();
    const nic = await open(device.addresses[0], { ring });
    const resetting = nic.queues[0].reset().catch((error: unknown) => error);
    await nic.close();
    await resetting;
    expect(nic.broken).toEqual(code('NIC_CLOSED'));
    await expect(nic.queues[0].reset()).rejects.toThrow(code('NIC_CLOSED'));
  });
});

describe('a device whose reset of a queue does not end', () => {
  it.each(['queue-reset-ignored', 'queue-reset-one'] as const)(
    'with the fault %s leaves a NIC that says so',
    async (fault) => {
      const device = await startDevice({ faults: [fault] });
      const nic = await open(device.addresses[0], { resetTimeout: 300 });
      await expect(nic.queues[0].reset('tx')).rejects.toThrow(code('QUEUE_RESET_TIMEOUT'));
      expect(nic.broken).toEqual(code('QUEUE_RESET_TIMEOUT'));
      expect(nic.queues[0].tx.burst(new Uint32Array(1), 1)).toBe(0);
    },
  );
});
