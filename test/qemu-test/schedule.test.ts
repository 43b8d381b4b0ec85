/** Which scenarios share a guest, and what a free job does next. */
import { describe, expect, it } from 'vitest';
import { groupByMachine, Schedule } from '../../qemu-test/host/schedule.ts';
import type { Machine, NamedScenario, ScenarioDevice } from '../../qemu-test/scenario.ts';

const tap: ScenarioDevice = { kind: 'virtio-net', id: 'nic', mac: '52:54:00:00:00:01', iommu: true, link: 'tap' };
const device: ScenarioDevice = { kind: 'vfio-user', id: 'nic', link: 'loopback' };

function named(
  name: string,
  { devices = [], timeout = 100, ...machine }: Partial<Machine> & { devices?: ScenarioDevice[]; timeout?: number } = {},
): NamedScenario {
  return {
    name,
    scenario: {
      title: '',
      machine: { qemu: 'stock', ...machine },
      devices,
      modules: [],
      timeout,
      checks: [],
      guest: async () => {},
    },
  };
}

const names = (groups: readonly (readonly NamedScenario[])[]) => groups.map((group) => group.map(({ name }) => name));

describe('scenarios', () => {
  it('share a guest when QEMU, IOMMU and processors are the same, whatever their memory', () => {
    const groups = groupByMachine([
      named('a'),
      named('b', { memory: 2048, cpus: 1, iommu: 48 }),
      named('device', { qemu: 'vfioUser' }),
      named('narrow', { iommu: 39 }),
      named('none', { iommu: 'none' }),
      named('two', { cpus: 2 }),
      named('c'),
    ]);
    expect(names(groups)).toEqual([['a', 'b', 'c'], ['device'], ['narrow'], ['none'], ['two']]);
  });

  it('are in the order of their times, the longest first', () => {
    const groups = groupByMachine([named('short', { timeout: 1 }), named('long', { timeout: 9 }), named('middle')]);
    expect(names(groups)).toEqual([['middle', 'long', 'short']]);
  });

  it('do not share one when there are more devices than slots, or when two have taps', () => {
    const many = Array.from({ length: 8 }, () => device);
    expect(names(groupByMachine([named('a', { devices: many }), named('b', { devices: many })]))).toEqual([
      ['a'],
      ['b'],
    ]);
    expect(names(groupByMachine([named('a', { devices: [tap] }), named('b', { devices: [tap] })]))).toEqual([
      ['a'],
      ['b'],
    ]);
  });
});

describe('a free job', () => {
  it('takes the group that lasts longest', () => {
    const schedule = new Schedule([
      named('a', { timeout: 50 }),
      named('b', { qemu: 'vfioUser', timeout: 40 }),
      named('c', { qemu: 'vfioUser', timeout: 30 }),
    ]);
    expect(names([schedule.take() ?? [], schedule.take() ?? []])).toEqual([['b', 'c'], ['a']]);
  });

  it('takes over half of what another has not begun, and nothing that has begun', () => {
    const schedule = new Schedule(['a', 'b', 'c', 'd'].map((name) => named(name)));
    const mine = schedule.take() ?? [];
    mine.shift();
    const taken = schedule.take() ?? [];
    expect(names([mine, taken])).toEqual([['b'], ['c', 'd']]);
    taken.shift();
    // One that is left in each is not worth another boot.
    expect(schedule.take()).toBeUndefined();
    expect(names([mine, taken])).toEqual([['b'], ['d']]);
  });

  it('has nothing to do when all have begun', () => {
    const schedule = new Schedule([named('a')]);
    schedule.take()?.shift();
    expect(schedule.take()).toBeUndefined();
  });
});
