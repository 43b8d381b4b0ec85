/**
 * Which scenarios share a guest, and what a free job does next. A boot costs several seconds of a processor, so scenarios that need the same
 * machine run in one guest, one after the other; a job that finds no group to begin takes over half of what another has not begun.
 */
import { MAX_DEVICES } from '../guest/guest.ts';
import type { Machine, NamedScenario } from '../scenario.ts';
import { hasTaps } from './taps.ts';

/** For fewer scenarios another boot costs more than waiting for them. */
const FEW = 2;

/** Scenarios for one guest, in the order in which they run. Whoever runs them takes out what it begins; the rest may be taken over. */
export type Group = NamedScenario[];

export class Schedule {
  readonly #waiting: Group[];
  readonly #begun = new Set<Group>();

  constructor(scenarios: Iterable<NamedScenario>) {
    this.#waiting = groupByMachine(scenarios);
  }

  /** The group that takes longest, or part of one that is being run, for a guest of its own; undefined when nothing is left to begin. */
  take(): Group | undefined {
    const group = this.#waiting.sort((a, b) => timeOf(b) - timeOf(a)).shift() ?? this.#split();
    if (group !== undefined) this.#begun.add(group);
    return group;
  }

  #split(): Group | undefined {
    const [longest] = [...this.#begun].filter(({ length }) => length >= FEW).sort((a, b) => timeOf(b) - timeOf(a));
    if (longest === undefined) return undefined;
    return longest.splice(Math.floor(longest.length / 2));
  }
}

/** Scenarios that can share a guest, in groups. The long ones are first: what is left at the end, or is taken over, is short. */
export function groupByMachine(scenarios: Iterable<NamedScenario>): Group[] {
  const groups: Group[] = [];
  for (const one of [...scenarios].sort((a, b) => b.scenario.timeout - a.scenario.timeout)) {
    const group = groups.find((others) => canJoin(others, one));
    if (group === undefined) groups.push([one]);
    else group.push(one);
  }
  return groups;
}

function canJoin(others: Group, one: NamedScenario): boolean {
  const all = [...others, one].map(({ scenario }) => scenario);
  const sameMachine = all.every(({ machine }) => kindOf(machine) === kindOf(one.scenario.machine));
  const devices = all.reduce((sum, scenario) => sum + scenario.devices.length, 0);
  // The subnets of taps are counted within a scenario.
  return sameMachine && devices <= MAX_DEVICES && all.filter((scenario) => hasTaps(scenario.devices)).length <= 1;
}

/** Memory apart: a guest has what the scenario needs that needs most. */
function kindOf({ qemu, iommu = 48, cpus = 1 }: Machine): string {
  return `${qemu} ${iommu} ${cpus}`;
}

function timeOf(group: Group): number {
  return group.reduce((sum, { scenario }) => sum + scenario.timeout, 0);
}
