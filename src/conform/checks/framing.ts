/** What both ring formats owe: buffers may be arranged in any way (Virtio 1.4, 2.7.4.1, 2.8.18), and those of a packet are used together. */
import { Feature } from '../../virtio/features.ts';
import type { Bench, UpOptions } from '../bench.ts';
import { expect } from '../check.ts';
import { isEqual, udpFrame } from '../frames.ts';
import { succeeded } from '../offer.ts';

const SMALL = 256;

/** Frames whose buffers are cut in several ways are sent as they are. */
export async function expectAnyCuts(bench: Bench, options: UpOptions): Promise<void> {
  const { driver, network } = await bench.network({ ...options, rx: { count: 8, split: 3 }, size: 64 });
  const header = driver.layout.length;
  for (const cuts of [[], [header], [header + 14], [5, header, header + 20, header + 60]]) {
    const sent = udpFrame(network.outward);
    await network.send(sent, {}, { cuts });
    const came = await network.departure(`a frame whose buffer was cut at ${cuts.join(', ') || 'nothing'}`);
    expect(isEqual(came, sent), `the frame that was cut at ${cuts.join(', ')} was sent with other bytes`);
    bench.log(`buffer cut at ${cuts.join(', ') || 'nothing'}: sent as it was`);
  }
}

/** Administration commands in several descriptors give what they give in one. */
export async function expectAnySplit(bench: Bench, options: UpOptions): Promise<void> {
  const admin = bench.console(await bench.up({ ...options, admin: true }));
  const whole = succeeded(await admin.listQuery());
  for (const split of [2, 3, 7]) {
    const name = `LIST_QUERY in ${split} + ${split} descriptors`;
    const result = succeeded(await admin.listQuery({ split, writable: 64, name }));
    expect(isEqual(result, whole), `${name} gives another result`);
  }
}

/** The buffers of one packet are used together. */
export async function expectUsedTogether(bench: Bench, options: UpOptions): Promise<void> {
  const rx = { count: 16, size: SMALL };
  const { driver, network } = await bench.network({ ...options, features: [Feature.MRG_RXBUF], rx });
  const ring = driver.ring(0);
  const length = 1000;
  const needed = Math.ceil((driver.layout.length + length) / SMALL);
  await network.inject(udpFrame({ ...network.inward, length }));
  await bench.eventually(() => ring.pending > 0, 'the packet did not arrive');
  const seen = ring.pending;
  bench.log(`${seen} buffers used at once for a packet that needs ${needed}`);
  expect(seen >= needed, `the packet needs ${needed} buffers, and ${seen} were used together`);
}
