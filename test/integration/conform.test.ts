import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';
import { CHECKS, type ConformanceOptions, type ConformanceReport, runConformance } from '../../src/conform/index.ts';
import { openFunction } from '../../src/index.ts';
import { conform, lines } from './conform-support.ts';
import type { LocalSetup } from './local-device.ts';
import { cleanUp, directory, spawnDevice, startDevice } from './support.ts';
import { vipsec, vipsecProcess } from './vipsec.ts';

/** Milliseconds that a device may take for an answer on a machine that has other things to do. */
const PATIENT = 10_000;

/** Milliseconds that all checks may take on such a machine. */
const WHOLE_RUN = 300_000;

afterEach(cleanUp);

/** A run that must be all green. */
interface Row {
  readonly name: string;
  readonly setup: LocalSetup;
  readonly run?: Partial<ConformanceOptions>;
  /** Fewer checks than this are not applicable. */
  readonly notApplicable: number;
}

const setups: readonly Row[] = [
  { name: 'with a peer and two queue pairs', setup: { queuePairs: 2, link: 'pair' }, notApplicable: 25 },
  { name: 'with packed virtqueues', setup: {}, run: { ring: 'packed' }, notApplicable: 40 },
  { name: 'of the draft', setup: { wire: 'rfc-2025-01' }, notApplicable: 50 },
];

/** All checks, none failed, most of them applicable. */
function expectGreen({ checks, lost }: ConformanceReport, notApplicable: number): void {
  expect(lines(checks.filter(({ verdict }) => verdict === 'fail'))).toEqual([]);
  expect(lost).toBeNull();
  expect(checks.map(({ id }) => id)).toEqual(CHECKS.map(({ id }) => id));
  expect(checks.filter(({ verdict }) => verdict === 'not-applicable').length).toBeLessThan(notApplicable);
}

describe('the conformance suite on the software device', () => {
  it(
    'passes all checks that apply on a loopback, in another process',
    async () => {
      const { addresses } = await startDevice();
      const open = () => openFunction(addresses[0]);
      const report = await runConformance({ open, timeout: PATIENT, checks: CHECKS });
      expectGreen(report, 40);
      expect(report.device).toMatchObject({ address: addresses[0], wire: 'virtio-1.4', link: 'loopback' });
    },
    WHOLE_RUN,
  );

  it.each(setups)(
    'passes all checks that apply $name',
    async ({ setup, run, notApplicable }) => {
      const report = await conform(setup, null, { timeout: PATIENT, ...run });
      expectGreen(report, notApplicable);
      expect(report.device.wire).toBe(setup.wire ?? 'virtio-1.4');
    },
    WHOLE_RUN,
  );

  it.each([
    // It does not accept any valid subset of its features (2.2.2).
    { rings: 'packed', formats: /^PKD/, broken: ['INI-005'] },
    { rings: 'split', formats: /^QUE/, broken: [] },
  ] as const)(
    'finds its way with a device that takes $rings virtqueues only',
    async ({ rings, formats, broken }) => {
      // What has to do with virtqueues, and packets of each kind.
      const ids = CHECKS.map(({ id }) => id).filter((id) => /^(INI|RST|QUE|PKD|ADM|CTL|HDR|IPS-02)/.test(id));
      const { checks, device } = await conform({ rings }, ids, { timeout: PATIENT });
      const failed = checks.filter(({ verdict }) => verdict === 'fail');
      expect(
        failed.map(({ id }) => id),
        lines(failed).join('\n'),
      ).toEqual(broken);
      expect(device.ring).toBe(rings);
      const passed = (area: RegExp) => checks.filter(({ id, verdict }) => area.test(id) && verdict === 'pass').length;
      for (const area of [formats, /^INI/, /^RST/, /^ADM/, /^CTL/, /^HDR/, /^IPS/]) {
        expect(passed(area), String(area)).toBeGreaterThan(3);
      }
    },
    WHOLE_RUN,
  );

  it('accepts a device that has the opcodes of QUERY and MODIFY from the table', async () => {
    const ids = CHECKS.map(({ id }) => id).filter((id) => /^(OBJ|FLT-002|IPS-002)/.test(id));
    const { checks } = await conform({ faults: ['query-modify-swapped'] }, ids);
    expect(lines(checks.filter(({ verdict }) => verdict !== 'pass'))).toEqual([]);
  });

  it('has nothing but not applicable and not testable about IPsec for a function without it', async () => {
    const ids = CHECKS.map(({ id }) => id).filter((id) => /^(ADM|CAP|OBJ|FLT|IPS)/.test(id));
    const { checks } = await conform({ ipsec: false }, ids);
    const other = checks.filter(({ verdict }) => verdict !== 'not-applicable' && verdict !== 'untestable');
    expect(lines(other)).toEqual([]);
  });
});

describe('vipsec conform', () => {
  it('prints one JSON document, writes JUnit and HTML, and exits with 0 when no MUST failed', async () => {
    const device = await startDevice();
    const [address] = device.addresses;
    const junit = join(directory(), 'good.xml');
    const html = join(directory(), 'good.html');
    const only = ['--only', 'OBJ', '--only', 'PCI-003,pci-009'];
    const run = await vipsecProcess(['conform', address, '--json', ...only, '--junit', junit, '--html', html]);
    expect(run.stderr).toBe('');
    expect(run.code).toBe(0);
    const report: unknown = JSON.parse(run.stdout);
    expect(report).toMatchObject({
      device: { address, vendorId: 0x1af4 },
      summary: { pass: 14, fail: 0, notApplicable: 0, untestable: 1 },
    });
    expect(report).toHaveProperty('checks.0', {
      id: 'PCI-003',
      section: '4.1.2.1',
      level: 'MUST',
      title: expect.stringContaining('0x1040'),
      verdict: 'pass',
      detail: expect.stringContaining('1af4'),
    });
    expect(readFileSync(junit, 'utf8')).toContain('tests="15" failures="0"');
    expect(readFileSync(html, 'utf8')).toContain('OBJ-004');
  });

  it('exits with 1 when a MUST failed, and says what was sent and what came', async () => {
    const device = await startDevice({ faults: ['adm-opcode-first'] });
    const [address] = device.addresses;
    const run = await vipsec(['conform', address, '--only', 'ADM-004']);
    expect(run.code).toBe(1);
    expect(run.stdout).toContain('FAIL ADM-004 (2.12.1.5, MUST)');
    expect(run.stdout).toContain('expected EINVAL/INVALID_GROUP, came EINVAL/INVALID_OPCODE');
    expect(run.stdout).toContain('does not conform: 1 MUST and 0 SHOULD failed');
  });

  it('exits with 0 when only a SHOULD failed', async () => {
    const device = await startDevice({ faults: ['obj-exists-as-einval'] });
    const [address] = device.addresses;
    const run = await vipsec(['conform', address, '--only', 'OBJ-001']);
    expect(run.code).toBe(0);
    expect(run.stdout).toContain('The device conforms; 1 SHOULD failed.');
  });

  it('prints its report even where JUnit or HTML cannot be written, and then fails', async () => {
    const device = await startDevice();
    const place = join(directory(), 'none', 'report.html');
    const run = await vipsec(['conform', device.addresses[0], '--only', 'PCI-003', '--html', place, '--json']);
    expect(run.code).toBe(1);
    expect(JSON.parse(run.stdout)).toMatchObject({ summary: { pass: 1 } });
    expect(run.stderr).toMatch(/^vipsec: error: .* \[ENOENT\]\n$/);
  });

  it('fails the checks that a silent device does not answer, in bounded time, and goes on', async () => {
    const device = await startDevice({ faults: ['admin-silent'] });
    const [address] = device.addresses;
    const args = ['--json', '--timeout', '100', '--only', 'ADM-001,ADM-006,PCI-003'];
    const run = await vipsec(['conform', address, ...args]);
    const { checks } = JSON.parse(run.stdout);
    expect(checks.map(({ verdict }: { verdict: string }) => verdict)).toEqual(['pass', 'fail', 'fail']);
    expect(run.code).toBe(1);
  });

  it('says so when the device dies, and cannot tell about what remains', async () => {
    const device = await spawnDevice({ faults: ['dies-after-start'] });
    const [address] = device.addresses;
    const run = await vipsec(['conform', address, '--json', '--only', 'ADM']);
    expect(run.code).toBe(1);
    expect(run.stderr).toContain('[DEVICE_GONE]');
    const { checks } = JSON.parse(run.stdout);
    const late = checks.find(({ id }: { id: string }) => id === 'ADM-027');
    expect(late).toMatchObject({ verdict: 'untestable', detail: expect.stringContaining('the device is gone') });
  });

  it('lists the checks without a device', async () => {
    const run = await vipsec(['conform', '--list', '--json']);
    expect(run.code).toBe(0);
    expect(JSON.parse(run.stdout)).toHaveLength(CHECKS.length);
  });

  it.each([
    ['no device', ['conform'], 'which device'],
    ['a check that does not exist', ['conform', 'vfio-user:/x', '--only', 'ADM-999'], 'there is no check ADM-999'],
    ['a timeout that is no number', ['conform', 'vfio-user:/x', '--timeout', 'soon'], 'milliseconds'],
    ['an address that is none', ['conform', 'nonsense'], 'DEVICE_ADDRESS'],
  ])('refuses %s with exit code 2', async (_, args, message) => {
    const run = await vipsec(args);
    expect(run.code).toBe(2);
    expect(run.stderr).toContain(message);
    expect(run.stdout).toBe('');
  });
});
