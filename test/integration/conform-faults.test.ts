import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { CHECKS, type Trial } from '../../src/conform/index.ts';
import { DeviceHost, lines, type Setup } from './conform-support.ts';

/** Checks that need more than one function with one queue pair on a loopback. */
const SETUPS: Readonly<Record<string, Setup>> = {};

const trials = CHECKS.filter((check): check is Trial => 'run' in check);
const table = trials.flatMap(({ id, title, faults }) => faults.map((fault) => ({ id, title, fault })));

let host: DeviceHost;
beforeAll(() => {
  host = new DeviceHost();
});
afterAll(() => host.close());

describe('each check of the conformance suite', () => {
  it.each(table)('$id fails on a device with the fault $fault: $title', async ({ id, fault }) => {
    const { checks } = await host.conform({ ...SETUPS[id], faults: fault.split('+') }, [id]);
    expect(
      checks.map(({ verdict }) => verdict),
      lines(checks).join('\n'),
    ).toEqual(['fail']);
  });
});
