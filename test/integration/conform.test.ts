import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { CHECKS, type ConformanceOptions } from '../../src/conform/index.ts';
import { conform, lines, type Setup } from './conform-support.ts';
import { startDeviceProcess, stop, vipsec } from './vipsec.ts';

/** Milliseconds that a device may take for an answer on a machine that has other things to do. */
const PATIENT = 10_000;

/** Milliseconds that all checks may take on such a machine. */
const WHOLE_RUN = 300_000;

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'vipsec-conform-'));
});
afterAll(() => {
  rmSync(folder, { recursive: true, force: true });
});

/** A run that must be all green. */
interface Row {
  readonly name: string;
  readonly setup: Setup;
  readonly run?: Partial<ConformanceOptions>;
  /** Fewer checks than this are not applicable. */
  readonly notApplicable: number;
  /** SHOULDs that such a device breaks by what it is. */
  readonly broken?: readonly string[];
}

const setups: readonly Row[] = [
  { name: 'on a loopback', setup: {}, notApplicable: 40 },
  { name: 'with a peer function', setup: { link: 'pair' }, notApplicable: 40 },
  { name: 'with a peer and two queue pairs', setup: { queuePairs: 2, link: 'pair' }, notApplicable: 25 },
  { name: 'with packed virtqueues', setup: {}, run: { ring: 'packed' }, notApplicable: 40 },
  // It does not accept any valid subset of its features (2.2.2).
  { name: 'that takes packed virtqueues only', setup: { rings: 'packed' }, notApplicable: 60, broken: ['INI-005'] },
  { name: 'that takes split virtqueues only', setup: { rings: 'split' }, notApplicable: 60 },
  { name: 'of the draft', setup: { wire: 'rfc-2025-01' }, notApplicable: 50 },
];

describe('the conformance suite on the software device', () => {
  it.each(setups)(
    'passes all checks that apply $name',
    async ({ setup, run, notApplicable, broken = [] }) => {
      const { checks, device, lost } = await conform(setup, null, { timeout: PATIENT, ...run });
      const failed = checks.filter(({ verdict }) => verdict === 'fail');
      expect(
        failed.map(({ id }) => id),
        lines(failed).join('\n'),
      ).toEqual(broken);
      expect(lost).toBeNull();
      expect(checks.map(({ id }) => id)).toEqual(CHECKS.map(({ id }) => id));
      expect(checks.filter(({ verdict }) => verdict === 'not-applicable').length).toBeLessThan(notApplicable);
      expect(device.wire).toBe(setup.wire ?? 'virtio-1.4');
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
    const socket = join(folder, 'good.sock');
    const device = await startDeviceProcess(socket);
    try {
      const junit = join(folder, 'good.xml');
      const html = join(folder, 'good.html');
      const only = ['--only', 'OBJ', '--only', 'PCI-003,pci-009'];
      const run = await vipsec(['conform', `vfio-user:${socket}`, '--json', ...only, '--junit', junit, '--html', html]);
      expect(run.stderr).toBe('');
      expect(run.code).toBe(0);
      const report: unknown = JSON.parse(run.stdout);
      expect(report).toMatchObject({
        device: { address: `vfio-user:${socket}`, vendorId: 0x1af4 },
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
    } finally {
      await stop(device);
    }
  });

  it('exits with 1 when a MUST failed, and says what was sent and what came', async () => {
    const socket = join(folder, 'bad.sock');
    const device = await startDeviceProcess(socket, ['--fault', 'adm-opcode-first']);
    try {
      const run = await vipsec(['conform', `vfio-user:${socket}`, '--only', 'ADM-004']);
      expect(run.code).toBe(1);
      expect(run.stdout).toContain('FAIL ADM-004 (2.12.1.5, MUST)');
      expect(run.stdout).toContain('expected EINVAL/INVALID_GROUP, came EINVAL/INVALID_OPCODE');
      expect(run.stdout).toContain('does not conform: 1 MUST and 0 SHOULD failed');
    } finally {
      await stop(device);
    }
  });

  it('exits with 0 when only a SHOULD failed', async () => {
    const socket = join(folder, 'fair.sock');
    const device = await startDeviceProcess(socket, ['--fault', 'obj-exists-as-einval']);
    try {
      const run = await vipsec(['conform', `vfio-user:${socket}`, '--only', 'OBJ-001']);
      expect(run.code).toBe(0);
      expect(run.stdout).toContain('The device conforms; 1 SHOULD failed.');
    } finally {
      await stop(device);
    }
  });

  it('fails the checks that a silent device does not answer, in bounded time, and goes on', async () => {
    const socket = join(folder, 'silent.sock');
    const device = await startDeviceProcess(socket, ['--fault', 'admin-silent']);
    try {
      const args = ['--json', '--timeout', '100', '--only', 'ADM-001,ADM-006,PCI-003'];
      const run = await vipsec(['conform', `vfio-user:${socket}`, ...args]);
      const { checks } = JSON.parse(run.stdout);
      expect(checks.map(({ verdict }: { verdict: string }) => verdict)).toEqual(['pass', 'fail', 'fail']);
      expect(run.code).toBe(1);
    } finally {
      await stop(device);
    }
  });

  it('says so when the device dies, and cannot tell about what remains', async () => {
    const socket = join(folder, 'mortal.sock');
    const device = await startDeviceProcess(socket, ['--fault', 'dies-after-start']);
    try {
      const run = await vipsec(['conform', `vfio-user:${socket}`, '--json', '--only', 'ADM']);
      expect(run.code).toBe(1);
      expect(run.stderr).toContain('[DEVICE_GONE]');
      const { checks } = JSON.parse(run.stdout);
      const late = checks.find(({ id }: { id: string }) => id === 'ADM-027');
      expect(late).toMatchObject({ verdict: 'untestable', detail: expect.stringContaining('the device is gone') });
    } finally {
      await stop(device);
    }
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
