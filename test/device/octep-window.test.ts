import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, describe, expect, it } from 'vitest';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import { READY_MARK, WINDOW_SIGNATURE } from '../../src/virtio/octep-layout.ts';
import { CommonCfgField as F } from '../../src/virtio/pci-layout.ts';
import { COMMON, FakeOctep, type FakeOctepOptions, ISR, notifyAt } from '../virtio/fake-octep.ts';
import { until } from './helpers/raw-client.ts';

const open: FakeOctep[] = [];
afterEach(() => {
  for (const fn of open.splice(0)) fn.close();
});

/** A driver that writes and reads single registers, and waits only when it is told to. */
function make(options: FakeOctepOptions = {}) {
  const fn = new FakeOctep(options);
  open.push(fn);
  const bar = fn.bar(4);
  const read = { 1: bar.read8, 2: bar.read16, 4: bar.read32 } as const;
  const get = (field: number, width: 1 | 2 | 4) => read[width](COMMON + field);
  /** Reads until the firmware has acknowledged, a bounded number of times; returns how often it took. */
  const acknowledged = (field: number, width: 1 | 2 | 4, value: number): number | null => {
    for (let i = 0; i < 50; i++) if (get(field, width) === value) return i;
    return null;
  };
  const selectFeatures = (word: number) => {
    bar.write32(COMMON + F.deviceFeatureSelect, word | 0x8000);
    return acknowledged(F.deviceFeatureSelect, 4, word);
  };
  const selectQueue = (queue: number) => {
    bar.write16(COMMON + F.queueSelect, queue | 0x8000);
    return acknowledged(F.queueSelect, 2, queue);
  };
  const accept = (features: FeatureSet) => {
    for (let word = 0; word < 2; word++) {
      bar.write32(COMMON + F.driverFeatureSelect, word | 0x8000);
      acknowledged(F.driverFeatureSelect, 4, word);
      bar.write32(COMMON + F.driverFeature, features.words[word]);
    }
  };
  const enable = (queue: number, size = 64) => {
    selectQueue(queue);
    bar.write16(COMMON + F.queueSize, size);
    for (const [i, field] of [F.queueDesc, F.queueDriver, F.queueDevice].entries()) {
      bar.write32(COMMON + field, 0x1000 * (8 * queue + i));
      bar.write32(COMMON + field + 4, 1);
    }
    bar.write16(COMMON + F.queueEnable, 1);
  };
  const start = async (wanted = true) => {
    fn.wanted = wanted;
    accept(fn.offered);
    bar.write8(COMMON + F.deviceStatus, 0x0b);
    for (let queue = 0; queue < 5; queue++) enable(queue);
    bar.write8(COMMON + F.deviceStatus, 0x0f);
    await until('the start', () => fn.log.includes('started'));
  };
  return { fn, bar, get, acknowledged, selectFeatures, selectQueue, accept, enable, start };
}

describe('the window of an octeon_ep class function', () => {
  it('begins with its signature, and has capabilities that are not aligned', () => {
    const { bar } = make();
    expect([bar.read32(0), bar.read32(4)]).toEqual(WINDOW_SIGNATURE);
    expect(bar.read8(0x34)).toBe(0x35);
    expect(Array.from({ length: 5 }, (_, i) => bar.read8(0x35 + i))).toEqual([9, 0x45, 16, 1, 4]);
  });

  it('has the ready mark and the number of interrupts in BAR 0', () => {
    const { fn } = make();
    const registers = fn.bar(0);
    expect(registers.read32(0x10210)).toBe(READY_MARK);
    registers.write32(0x10210, 0);
    expect(registers.read32(0x10210)).toBe(0);
    expect((registers.read32(0x10004) >>> 16) & 0xf).toBe(8);
  });

  it('shows the features of a word that was selected, and acknowledged', () => {
    const { fn, get, selectFeatures } = make();
    expect(selectFeatures(1)).toBeGreaterThan(0);
    expect(get(F.deviceFeature, 4)).toBe(fn.offered.words[1]);
    selectFeatures(0);
    expect(get(F.deviceFeature, 4)).toBe(fn.offered.words[0]);
  });

  it('shows those of the word before to a driver that does not wait', () => {
    const { fn, bar, get, selectFeatures } = make();
    selectFeatures(1);
    bar.write32(COMMON + F.deviceFeatureSelect, 0x8000);
    expect(get(F.deviceFeature, 4)).toBe(fn.offered.words[1]);
    expect(get(F.deviceFeatureSelect, 4)).toBe(0x8000);
  });

  it('never acts on a selection as the standard makes it, without the bit', async () => {
    const { bar, get, fn } = make();
    bar.write32(COMMON + F.deviceFeatureSelect, 1);
    await sleep(40);
    expect(get(F.deviceFeatureSelect, 4)).toBe(1);
    expect(get(F.deviceFeature, 4)).toBe(0);
    expect(fn.offered.words[1]).not.toBe(0);
  });

  it('leaves the word before in the register for words that its firmware does not know, and acknowledges', () => {
    const { fn, get, selectFeatures } = make();
    selectFeatures(1);
    expect(selectFeatures(2)).not.toBeNull();
    expect(get(F.deviceFeature, 4)).toBe(fn.offered.words[1]);
    const later = make({ ipsec: true });
    later.selectFeatures(2);
    expect(later.get(F.deviceFeature, 4)).toBe(later.fn.offered.words[2]);
    expect(later.fn.offered.has(Feature.IPSEC)).toBe(true);
  });

  it('takes FEATURES_OK for anything: the register is memory', async () => {
    const { bar, get, accept, fn } = make();
    accept(FeatureSet.of(Feature.VERSION_1, Feature.EVENT_IDX));
    bar.write8(COMMON + F.deviceStatus, 0x0b);
    expect(get(F.deviceStatus, 1)).toBe(0x0b);
    await sleep(40);
    expect(get(F.deviceStatus, 1)).toBe(0x0b);
    expect(fn.common.status & 8).toBe(0);
  });

  it('is reset by 0x80, and reads 0 when it is', async () => {
    const { fn, bar, get, start, acknowledged } = make();
    await start();
    fn.log.length = 0;
    bar.write8(COMMON + F.deviceStatus, 0x80);
    expect(get(F.deviceStatus, 1)).toBe(0x80);
    expect(acknowledged(F.deviceStatus, 1, 0)).not.toBeNull();
    expect(fn.log).toEqual(['reset']);
    expect(fn.common.queues.some(({ enabled }) => enabled)).toBe(false);
  });

  it('is not reset by a driver that writes 0, sees 0, and goes on', async () => {
    const { fn, bar, get, start, accept, enable } = make();
    await start();
    fn.log.length = 0;
    bar.write8(COMMON + F.deviceStatus, 0);
    expect(get(F.deviceStatus, 1)).toBe(0);
    bar.write8(COMMON + F.deviceStatus, 3);
    accept(fn.offered.without(Feature.MRG_RXBUF));
    bar.write8(COMMON + F.deviceStatus, 0x0b);
    enable(0);
    expect(fn.log).toEqual([]);
    expect(fn.common.features.has(Feature.MRG_RXBUF)).toBe(true);
  });

  it('forgets what is selected while it is being reset', async () => {
    const { fn, bar, start, selectFeatures, acknowledged } = make();
    await start();
    bar.write8(COMMON + F.deviceStatus, 0x80);
    expect(selectFeatures(0)).toBeNull();
    expect(acknowledged(F.deviceStatus, 1, 0)).toBe(0);
    expect(selectFeatures(0)).not.toBeNull();
    expect(fn.log.at(-1)).toBe('reset');
  });

  it('keeps the registers of each queue', () => {
    const { get, bar, selectQueue } = make();
    expect(selectQueue(0)).toBeGreaterThan(1);
    expect(get(F.queueSize, 2)).toBe(4096);
    bar.write16(COMMON + F.queueSize, 256);
    selectQueue(3);
    expect([get(F.queueSize, 2), get(F.queueNotifyOff, 2)]).toEqual([4096, 3]);
    selectQueue(0);
    expect([get(F.queueSize, 2), get(F.queueNotifyOff, 2)]).toEqual([256, 0]);
  });

  it('gives what is written too early to the queue that was selected before', async () => {
    const { fn, bar, selectQueue, enable, accept } = make();
    accept(fn.offered);
    bar.write8(COMMON + F.deviceStatus, 0x0b);
    enable(0);
    selectQueue(0);
    bar.write16(COMMON + F.queueSelect, 1 | 0x8000);
    bar.write16(COMMON + F.queueSize, 32);
    bar.write16(COMMON + F.queueEnable, 1);
    await sleep(60);
    expect(fn.enabled.map(({ index }) => index)).toEqual([0]);
    selectQueue(1);
    expect(bar.read16(COMMON + F.queueSize)).toBe(4096);
  });

  it('never acknowledges a queue beyond those that the firmware has room for', () => {
    const { selectQueue } = make();
    expect(selectQueue(129)).toBeNull();
    expect(selectQueue(1)).not.toBeNull();
  });

  it('enables a queue where it was described', async () => {
    const { fn, start } = make();
    await start();
    expect(fn.log.slice(0, 6)).toEqual(['enabled 0', 'enabled 1', 'enabled 2', 'enabled 3', 'enabled 4', 'started']);
    expect([...fn.enabled[1].words]).toEqual([0x8000, 1, 0x9000, 1, 0xa000, 1]);
    expect(fn.enabled[1].size).toBe(64);
    expect(fn.common.violations).toBe(0);
  });

  it('takes from a notification where the queue stands, and from one of 16 bits nothing', () => {
    const { fn, bar } = make();
    expect(fn.window.reach(1).next).toBe(0x8000);
    bar.write16(notifyAt(1), 1);
    expect(fn.window.reach(1).next).toBe(0x8000);
    bar.write32(notifyAt(1), 1 + 0x8005 * 0x10000);
    expect(fn.window.reach(1).next).toBe(0x8005);
    bar.write16(notifyAt(1), 1);
    expect(fn.window.reach(1).next).toBe(0x8005);
  });

  it('flags the cause of an interrupt, and shares the vectors between queues', async () => {
    const { fn, bar, start } = make({ queuePairs: 8 });
    await start();
    fn.log.length = 0;
    for (const queue of [0, 1, 2, 8, 11, 16]) fn.window.interruptQueue(queue);
    expect(fn.log).toEqual(['fired 0', 'fired 1', 'fired 2', 'fired 0', 'fired 3', 'fired 0']);
    expect([0, 1, 2, 3, 8, 10].map((queue) => bar.read8(notifyAt(queue) + 4))).toEqual([1, 1, 1, 0, 1, 0]);
    bar.write8(notifyAt(2) + 4, 0);
    expect(bar.read8(notifyAt(2) + 4)).toBe(0);
  });

  it('asks transmit queues each time whether they want interrupts, and receive queues once', async () => {
    const { fn, start } = make();
    await start();
    fn.wanted = false;
    fn.log.length = 0;
    for (const queue of [0, 1, 2, 3, 4]) fn.window.interruptQueue(queue);
    expect(fn.log).toEqual(['fired 0', 'fired 2']);
  });

  it('gives interrupts to receive queues alone, in turn, with the firmware of 2024', async () => {
    const { fn, start } = make({ queuePairs: 8, faults: ['octep-interrupts-in-turn'] });
    await start();
    fn.log.length = 0;
    for (const queue of [0, 1, 2, 3, 14, 16]) fn.window.interruptQueue(queue);
    expect(fn.log).toEqual(['fired 0', 'fired 1', 'fired 7']);
  });

  it('never interrupts a driver that wanted no interrupts when it started the device', async () => {
    const { fn, start } = make();
    await start(false);
    fn.wanted = true;
    fn.log.length = 0;
    fn.window.interruptQueue(0);
    expect(fn.log).toEqual([]);
  });

  it('tells of changes in the ISR byte, which a read does not clear', () => {
    const { fn, bar } = make();
    fn.window.interruptConfig(false);
    expect(fn.log).toEqual(['fired 0']);
    expect([bar.read8(ISR), bar.read8(ISR)]).toEqual([2, 2]);
    bar.write8(ISR, 0);
    expect(bar.read8(ISR)).toBe(0);
  });

  it('answers the mailbox: any state of a queue is taken, and each is at its start', async () => {
    const { bar } = make();
    const [header, status, state] = [0x140, 0x148, 0x15c];
    const ask = (id: number) => {
      bar.write32(status, 0);
      bar.write16(header + 2, id);
      bar.write16(header + 6, 0xdead);
      for (let i = 0; i < 9 && bar.read32(status) === 0; i++);
      return [bar.read16(header + 6), bar.read32(status)];
    };
    expect(ask(1)).toEqual([0xbeef, 1]);
    expect(ask(2)).toEqual([0xbeef, 1]);
    expect([bar.read16(state), bar.read16(state + 2)]).toEqual([1, 1]);
    expect(ask(7)).toEqual([0xbeef, 1 + 2 * 22]);
  });

  it('takes any access to any place without a word', () => {
    const { fn, bar } = make({ ipsec: true });
    for (let at = 0; at < bar.size; at += at < 0x200 ? 1 : 512) {
      bar.write8(at, 0xff);
      bar.read8(at);
      if (at % 4 === 0) bar.write32(at, 0xffffffff);
    }
    for (let i = 0; i < 8; i++) bar.read16(COMMON + F.queueSelect);
    expect(fn.bar(0).read32(0)).toBe(0);
  });
});
