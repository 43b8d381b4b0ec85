import { join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';
import type { OctepFault } from '../../src/device/index.ts';
import type { ProbeReport } from '../../src/index.ts';
import { cleanUp, type DeviceSetup, directory, startDevice } from './support.ts';
import { vipsec } from './vipsec.ts';

afterEach(cleanUp);

/** Milliseconds for what never comes. */
const PATIENCE: Partial<Record<OctepFault, string>> = { 'octep-not-ready': '300', 'octep-reset-ignored': '300' };

function patience(fault: OctepFault): string[] {
  const ms = PATIENCE[fault];
  return ms === undefined ? [] : ['--timeout', ms];
}

async function probe(setup: DeviceSetup, args: string[] = []) {
  const { addresses } = await startDevice({ personality: 'octep', ...setup });
  return { address: addresses[0], ...(await vipsec(['probe', addresses[0], ...args])) };
}

async function report(setup: DeviceSetup, args: string[] = []) {
  const { address, code, stdout } = await probe(setup, ['--json', ...args]);
  expect(stdout.trim().split('\n')).toHaveLength(1);
  const found: ProbeReport = JSON.parse(stdout);
  return { address, code, report: found };
}

describe('vipsec probe of an octeon_ep class function', () => {
  it('recognises it, and says that its firmware speaks virtio', async () => {
    const { code, stdout, stderr } = await probe({});
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
    expect(stdout).toMatch(/octeon_ep class: a virtual function of CN106K; its firmware speaks virtio/);
    for (const row of [
      /ok +PCI ids .* 177d:b903/,
      /ok +ready mark .* 0xbabababa/,
      /ok +firmware signature .* 0xfeedfeed 0x3355ffaa/,
      /ok +interrupts .* 8$/m,
      /ok +capability list .*COMMON at 0x35/,
      /ok +reset /,
      /ok +required features .*all of them/,
      /ok +features 64 to 127 .*VIRTIO_NET_F_IPSEC/,
      /ok +queue selection .*3 queues of up to 4096/,
      /70 +VIRTIO_NET_F_IPSEC +yes/,
      /0xa +RESOURCE_OBJ_CREATE/,
      /ESP tunnel +AEAD +aes-gcm/,
    ]) {
      expect(stdout).toMatch(row);
    }
    expect(stdout).not.toContain('Problems');
    expect(stdout).not.toContain('FAILED');
  });

  it('gives the same as one JSON document, and can be repeated', async () => {
    const first = await report({ queuePairs: 3 });
    expect(first.code).toBe(0);
    expect(first.report.problems).toEqual([]);
    expect(first.report.octep).toMatchObject({ model: 'CN106K', virtualFunction: true, speaksVirtio: true });
    expect(first.report.octep?.steps.every(({ ok }) => ok)).toBe(true);
    expect(first.report.queues).toHaveLength(7);
    expect(first.report.queues?.at(-1)).toEqual({ index: 6, name: 'controlq', maxSize: 4096 });
    expect(first.report.ipsec?.modes).toHaveLength(4);
    const again = await vipsec(['probe', first.address, '--json']);
    expect(JSON.parse(again.stdout)).toEqual(first.report);
  });

  it('says of published firmware that it leaves IPsec to software', async () => {
    const { report: found } = await report({ ipsec: false });
    expect(found.octep?.steps).toContainEqual({
      step: 'features 64 to 127',
      expected: 'of their own, where IPsec is to be offloaded',
      read: 'none: IPsec runs in software',
      ok: true,
    });
    expect(found.features?.find(({ bit }) => bit === 70)?.offered).toBe(false);
  });

  it.each([
    ['octep-physical', 'OCTEP_PHYSICAL', 'PCI ids', null],
    ['octep-no-window', 'OCTEP_BAR', 'virtio window', null],
    ['octep-no-signature', 'OCTEP_SIGNATURE', 'firmware signature', false],
    ['octep-no-interrupts', 'OCTEP_INTERRUPTS', 'interrupts', true],
    ['octep-capability-bar', 'OCTEP_CAPABILITIES', 'capability list', true],
    ['octep-vendor', 'OCTEP_VENDOR_DATA', 'virtio device type', true],
    ['octep-not-ready', 'OCTEP_NOT_READY', 'ready mark', null],
    ['octep-reset-ignored', 'RESET_TIMEOUT', 'reset', true],
  ] as const)('ends with %s at the step that fails, with a hint: %s at "%s"', async (fault, code, step, speaks) => {
    const { code: exit, report: found } = await report({ faults: [fault] }, patience(fault));
    expect(exit).toBe(1);
    expect(found.problems.map((problem) => problem.code)).toEqual([code]);
    expect(found.octep?.speaksVirtio).toBe(speaks);
    const last = found.octep?.steps.at(-1);
    expect(last?.step.startsWith(step)).toBe(true);
    expect(last?.ok).toBe(false);
    expect(last?.hint).toMatch(/\w+/);
    expect(found.octep?.steps.slice(0, -1).every(({ ok }) => ok)).toBe(true);
    expect(found).not.toHaveProperty('admin');
  });

  it('goes on after features that are missing, because the rest can be seen', async () => {
    const { code, report: found } = await report({ faults: ['octep-split-only'] });
    expect(code).toBe(1);
    expect(found.octep?.steps.find(({ ok }) => !ok)).toMatchObject({
      step: 'required features',
      read: 'not offered: VIRTIO_F_RING_PACKED',
      hint: expect.stringMatching(/another version/),
    });
    expect(found.problems.map(({ code: problem }) => problem)).toEqual(['FEATURES_MISSING']);
    expect(found).toHaveProperty('config');
  });

  it('prints the step that failed, what was read, and the way out', async () => {
    const { code, stdout } = await probe({ faults: ['octep-no-signature'] });
    expect(code).toBe(1);
    expect(stdout).toMatch(/its firmware does not speak virtio/);
    expect(stdout).toMatch(/FAILED +firmware signature \(BAR 4 \+ 0x0\) +0xfeedfeed 0x3355ffaa +0x0 0x0/);
    expect(stdout).toMatch(/^hint: The ids are also those of a plain NIC/m);
    expect(stdout).toMatch(/Administration queue and IPsec\nnot reached/);
  });
});

describe('vipsec device --personality octep', () => {
  it.each([
    ['split rings', ['--personality', 'octep', '--rings', 'split'], /packed virtqueues only/],
    ['faults of octep on a standard function', ['--fault', 'octep-physical'], /no fault octep-physical/],
  ])('is refused with %s', async (_, args, text) => {
    const { code, stderr } = await vipsec(['device', '--socket', join(directory(), 'other'), ...args]);
    expect(code).toBe(2);
    expect(stderr).toMatch(text);
  });

  it('lists its faults', async () => {
    const { stdout } = await vipsec(['device', '--help']);
    expect(stdout).toMatch(/Faults of --personality octep:\n {2}octep-physical/);
  });
});
