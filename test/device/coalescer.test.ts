/** When held back interrupts are sent (Virtio 1.4, 5.1.9.5.10), with a clock of the test's own. */
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { Coalescer } from '../../src/device/coalescer.ts';
import { NO_FAULTS } from '../../src/device/faults.ts';

let now = 1000;
let sent: number[] = [];
let coalescer: Coalescer;

beforeEach(() => {
  now = 1000;
  sent = [];
  vi.spyOn(performance, 'now').mockImplementation(() => now);
  coalescer = new Coalescer(4, (index) => void sent.push(index), NO_FAULTS);
});

afterEach(() => {
  vi.restoreAllMocks();
});

describe('an interrupt that the driver wants', () => {
  it('is sent at once when nothing was set, or one of the two numbers is 0', () => {
    for (const setting of [null, { maxPackets: 0, maxMicroseconds: 9 }, { maxPackets: 9, maxMicroseconds: 0 }]) {
      if (setting !== null) coalescer.set(0, setting);
      coalescer.used(0, 1, true);
      coalescer.used(0, 1, false);
      expect(sent.splice(0)).toEqual([0]);
    }
  });

  it('waits for so many packets', () => {
    coalescer.set(1, { maxPackets: 10, maxMicroseconds: 1_000_000 });
    for (const packets of [3, 3, 3]) coalescer.used(1, packets, true);
    expect(sent).toEqual([]);
    coalescer.used(1, 1, true);
    expect(sent).toEqual([1]);
    // And counts anew.
    coalescer.used(1, 9, true);
    expect(sent).toEqual([1]);
  });

  it('waits for so much time, counted from the first packet', () => {
    coalescer.set(0, { maxPackets: 1000, maxMicroseconds: 5000 });
    coalescer.used(0, 1, true);
    now += 4;
    coalescer.used(0, 1, true);
    coalescer.expire(false);
    expect(sent).toEqual([]);
    now += 1;
    coalescer.expire(false);
    coalescer.expire(false);
    expect(sent).toEqual([0]);
  });

  it('is not sent when the driver did not want it', () => {
    coalescer.set(0, { maxPackets: 2, maxMicroseconds: 1000 });
    coalescer.used(0, 50, false);
    now += 100;
    coalescer.expire(true);
    expect(sent).toEqual([]);
  });

  it('is sent with all others before the device sleeps', () => {
    coalescer.setAll(0, { maxPackets: 100, maxMicroseconds: 1_000_000 });
    coalescer.used(0, 1, true);
    coalescer.used(2, 1, true);
    coalescer.expire(true);
    expect(sent).toEqual([0, 2]);
  });

  it('is sent when the conditions change under it', () => {
    coalescer.set(3, { maxPackets: 100, maxMicroseconds: 1_000_000 });
    coalescer.used(3, 1, true);
    coalescer.set(3, { maxPackets: 0, maxMicroseconds: 0 });
    expect(sent).toEqual([3]);
  });

  it('goes with its queue when that is reset', () => {
    coalescer.set(0, { maxPackets: 100, maxMicroseconds: 10 });
    coalescer.used(0, 1, true);
    coalescer.forget(0);
    now += 100;
    coalescer.expire(true);
    expect(sent).toEqual([]);
    expect(coalescer.get(0)).toEqual({ maxPackets: 0, maxMicroseconds: 0 });
  });
});

describe('what was set', () => {
  it('for all receive queues says nothing of transmit queues, and a queue that is enabled again begins with it', () => {
    const all = { maxPackets: 8, maxMicroseconds: 100 };
    coalescer.setAll(0, all);
    coalescer.set(2, { maxPackets: 1, maxMicroseconds: 1 });
    expect([0, 1, 2, 3].map((index) => coalescer.get(index).maxPackets)).toEqual([8, 0, 1, 0]);
    coalescer.forget(2);
    expect(coalescer.get(2)).toEqual(all);
    coalescer.forget(99);
  });

  it('is forgotten by a reset, with what was held back', () => {
    coalescer.setAll(1, { maxPackets: 8, maxMicroseconds: 100 });
    coalescer.used(1, 1, true);
    coalescer.clear();
    now += 100;
    coalescer.expire(true);
    expect(sent).toEqual([]);
    expect(coalescer.get(1).maxPackets).toBe(0);
  });

  it('may be the largest numbers that there are', () => {
    coalescer.set(0, { maxPackets: 0xffffffff, maxMicroseconds: 0xffffffff });
    coalescer.used(0, 1_000_000, true);
    now += 4_000_000;
    coalescer.expire(false);
    expect(sent).toEqual([]);
    now += 300_000;
    coalescer.expire(false);
    expect(sent).toEqual([0]);
  });
});
