/**
 * What a check of the conformance suite is, and what it can come to.
 *
 * A check stands for one normative statement of Virtio 1.4 about the device. It either runs, or it says why a driver
 * cannot tell. A statement about something that the device does not have is not applicable.
 */
import type { Bench } from './bench.ts';

export type Level = 'MUST' | 'SHOULD';
export type Verdict = 'pass' | 'fail' | 'not-applicable' | 'untestable';

/** Areas of the standard, by the prefix of their checks' ids. */
export const AREAS = {
  PCI: 'PCI: discovery, capabilities, common configuration, MSI-X',
  INI: 'Initialisation, features, configuration space',
  QUE: 'Split virtqueues',
  PKD: 'Packed virtqueues',
  ADM: 'Administration commands',
  CAP: 'Capabilities',
  OBJ: 'Resource objects',
  FLT: 'Flow filter',
  IPS: 'IPsec',
  HDR: 'Packets and their headers',
  CTL: 'Control virtqueue',
  RST: 'Reset',
} as const;
export type Area = keyof typeof AREAS;

interface Statement {
  /** `ADM-004`: never given to another statement. */
  readonly id: `${Area}-${string}`;
  /** Section of Virtio 1.4 that holds the statement. */
  readonly section: string;
  readonly level: Level;
  /** What the device does when it conforms. */
  readonly title: string;
}

/** A statement that is tried. */
export interface Trial extends Statement {
  /** Faults of the software device (`vipsec device --fault`), each of which this check must find. */
  readonly faults: readonly string[];
  /** Throws when the device does not do what the statement says. */
  run(bench: Bench): void | Promise<void>;
}

/** A statement that a driver cannot try. */
export interface Untried extends Statement {
  readonly untestable: string;
}

export type Check = Trial | Untried;

/** What became of a check. */
export interface CheckResult extends Statement {
  readonly verdict: Verdict;
  /** What was sent and what came, and what was expected instead. */
  readonly detail: string;
  /** Milliseconds. */
  readonly duration: number;
}

/** The device does not do what the statement says. */
export class Failed extends Error {}
/** The device does not have what the statement is about. */
export class NotApplicable extends Error {}
/** A driver cannot tell here. */
export class Untestable extends Error {}

/** Throws `Failed` unless `condition` holds. */
export function expect(condition: boolean, otherwise: string | (() => string)): asserts condition {
  if (!condition) throw new Failed(typeof otherwise === 'string' ? otherwise : otherwise());
}

/** Throws `NotApplicable` unless `condition` holds. */
export function need(condition: boolean, otherwise: string): asserts condition {
  if (!condition) throw new NotApplicable(otherwise);
}

/** The area that a check belongs to. */
export function areaOf(id: Statement['id'] | string): Area {
  const prefix = id.slice(0, id.indexOf('-'));
  for (const area in AREAS) if (isArea(area) && area === prefix) return area;
  throw new RangeError(`${id} belongs to no area`);
}

function isArea(name: string): name is Area {
  return Object.hasOwn(AREAS, name);
}

export function hex(value: number, digits = 1): string {
  return `0x${value.toString(16).padStart(digits, '0')}`;
}

/** A check of a MUST. */
export function must(
  id: Statement['id'],
  section: string,
  title: string,
  faults: readonly string[],
  run: Trial['run'],
): Trial {
  return { id, section, level: 'MUST', title, faults, run };
}

/** A check of a SHOULD. */
export function should(
  id: Statement['id'],
  section: string,
  title: string,
  faults: readonly string[],
  run: Trial['run'],
): Trial {
  return { id, section, level: 'SHOULD', title, faults, run };
}

/** A statement that a driver cannot try, with the reason. */
export function untried(
  id: Statement['id'],
  section: string,
  level: Level,
  title: string,
  untestable: string,
): Untried {
  return { id, section, level, title, untestable };
}
