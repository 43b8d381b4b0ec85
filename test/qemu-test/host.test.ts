import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { connect, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { countInterrupts } from '../../qemu-test/guest/place.ts';
import { consoleFaults } from '../../qemu-test/host/faults.ts';
import { FramePort } from '../../qemu-test/host/frames.ts';
import { commandLine, firstPlace } from '../../qemu-test/host/machine.ts';
import { lineSplitter, run } from '../../qemu-test/host/process.ts';
import { resultTable } from '../../qemu-test/host/report.ts';
import { type TapSupport, tapSupport, withTaps } from '../../qemu-test/host/taps.ts';
import { Mailbox, parseGuestMessage, parseHostMessage } from '../../qemu-test/messages.ts';
import {
  type NamedScenario,
  type QemuNic,
  type Scenario,
  type ScenarioDevice,
  tapAddresses,
} from '../../qemu-test/scenario.ts';

describe('messages between guest and host', () => {
  it.each([
    [{ type: 'ready' }],
    [{ type: 'begin', check: 'c' }],
    [{ type: 'check', check: 'c', ok: true, detail: 'd', ms: 3 }],
    [{ type: 'note', topic: 't', body: { any: ['thing'] } }],
    [{ type: 'end', error: null, left: ['a process'] }],
    [{ type: 'exit', status: 139 }],
  ])('%j is understood', (message) => {
    expect(parseGuestMessage(JSON.stringify(message))).toEqual(message);
  });

  it.each([[{ type: 'note', topic: 't', body: null }], [{ type: 'run', scenario: 'a', first: 2 }], [{ type: 'over' }]])(
    '%j is understood by the guest',
    (message) => {
      expect(parseHostMessage(JSON.stringify(message))).toEqual(message);
    },
  );

  it.each([
    '',
    'Segmentation fault',
    '[]',
    'null',
    '{"type":"check","check":"c"}',
    '{"type":"other"}',
    '{"type":"end"}',
    '{"type":"end","error":null}',
    '{"type":"run","scenario":"a"}',
  ])('%j is not a message', (line) => {
    expect(parseGuestMessage(line)).toBeUndefined();
    expect(parseHostMessage(line)).toBeUndefined();
  });

  it('lines that arrive in pieces are put together', () => {
    const lines: string[] = [];
    const split = lineSplitter((line) => lines.push(line));
    for (const piece of ['a', 'b\nc', '', '\n\nd']) split(piece);
    expect(lines).toEqual(['ab', 'c', '']);
  });
});

describe('the mailbox', () => {
  it('keeps notes for whoever asks later, in order and by topic', async () => {
    const box = new Mailbox();
    box.put('a', 1);
    box.put('b', 2);
    box.put('a', 3);
    expect([await box.take('a', 10), await box.take('a', 10), await box.take('b', 10)]).toEqual([1, 3, 2]);
  });

  it('gives a note to the one who waits for it', async () => {
    const box = new Mailbox();
    const later = box.take('a', 1000);
    box.put('a', 'now');
    expect(await later).toBe('now');
  });

  it('stops waiting after the time, and a note that comes then is kept', async () => {
    const box = new Mailbox();
    await expect(box.take('a', 5)).rejects.toThrow(/within 5 ms/);
    box.put('a', 1);
    expect(await box.take('a', 5)).toBe(1);
  });

  it('stops waiting when the other side is gone', async () => {
    const box = new Mailbox();
    const gone = new AbortController();
    const waiting = box.take('a', 10_000, gone.signal);
    gone.abort();
    await expect(waiting).rejects.toThrow(/gone/);
    await expect(box.take('a', 10_000, gone.signal)).rejects.toThrow(/gone/);
  });
});

describe('the frame port', () => {
  let folder: string;
  let port: FramePort;
  let guest: Socket;
  beforeEach(async () => {
    folder = mkdtempSync(join(tmpdir(), 'vipsec-frames-'));
    port = await FramePort.listen(join(folder, 's'));
    guest = connect(join(folder, 's'));
    await new Promise((resolve) => guest.once('connect', resolve));
  });
  afterEach(() => {
    guest.destroy();
    port.close();
    rmSync(folder, { recursive: true, force: true });
  });

  const framed = (text: string) => {
    const length = Buffer.alloc(4);
    length.writeUInt32BE(text.length);
    return Buffer.concat([length, Buffer.from(text)]);
  };
  const any = () => true;

  it('gives frames in order, however the stream is cut', async () => {
    const stream = Buffer.concat([framed('one'), framed(''), framed('three')]);
    for (const byte of stream) guest.write(Buffer.of(byte));
    const frames = [await port.next(any, 2000), await port.next(any, 2000), await port.next(any, 2000)];
    expect(frames.map(String)).toEqual(['one', '', 'three']);
  });

  it('gives the frame that was asked for and keeps the others', async () => {
    guest.write(Buffer.concat([framed('noise'), framed('wanted')]));
    expect(String(await port.next((f) => f.toString() === 'wanted', 2000))).toBe('wanted');
    expect(String(await port.next(any, 2000))).toBe('noise');
  });

  it('sends a frame behind its length', async () => {
    guest.write(framed('hello'));
    await port.next(any, 2000);
    const got = new Promise<Buffer>((resolve) => guest.once('data', resolve));
    port.send(Buffer.from('abc'));
    expect(await got).toEqual(framed('abc'));
  });

  it('refuses a stream that is out of step instead of waiting for gigabytes', async () => {
    guest.write(Buffer.from('ffffffffff'));
    await expect(port.next(any, 2000)).rejects.toThrow(/broken/);
  });

  it('says how many frames came when the one asked for did not', async () => {
    guest.write(framed('noise'));
    await expect(port.next(() => false, 100)).rejects.toThrow(/1 came in all/);
  });
});

describe('the machine', () => {
  const nic = (id: string, more: Partial<QemuNic> = {}): QemuNic => ({
    kind: 'virtio-net',
    id,
    mac: '52:54:00:00:00:01',
    iommu: true,
    link: 'host',
    ...more,
  });
  const parts = {
    kernel: '/k',
    release: '6',
    modules: '/m',
    busybox: '/b',
    tools: '/t',
    qemu: { stock: { command: 'qemu', args: ['-first'] }, vfioUser: { command: 'qemu11', args: [], env: { A: 'b' } } },
  };
  const scenario = (devices: readonly ScenarioDevice[], machine: Partial<Scenario['machine']> = {}): Scenario => ({
    title: '',
    machine: { qemu: 'stock', ...machine },
    devices,
    modules: ['virtio_net'],
    timeout: 1,
    checks: [],
    guest: async () => {},
  });
  const lineOf = (scenarios: readonly NamedScenario[], taps?: TapSupport) =>
    commandLine(
      scenarios,
      parts,
      { image: { initramfs: '/i', base: '/e' }, sockets: '/s', dist: '/d', guestDist: 'dist', taps, capture: '/c' },
      false,
    );
  const line = (s: Scenario) => lineOf([{ name: 'name', scenario: s }]);
  const devicesOf = (s: Scenario) =>
    line(s)
      .args.filter((arg) => arg.startsWith('{"driver'))
      .map((arg) => JSON.parse(arg));

  const kernelWords = (args: readonly string[]) => args[args.indexOf('-append') + 1].split(' ');

  it('tells the kernel where the package is and which modules to load: each that a scenario needs, once', () => {
    expect(kernelWords(line(scenario([])).args)).toEqual(
      expect.arrayContaining(['vipsec.modules=virtio_net', 'vipsec.dist=dist', 'intel_iommu=on']),
    );
    const more = { ...scenario([]), modules: ['tun', 'virtio_net'] };
    const { args } = lineOf([
      { name: 'a', scenario: scenario([]) },
      { name: 'b', scenario: more },
    ]);
    expect(kernelWords(args)).toContain('vipsec.modules=virtio_net,tun');
  });

  it('has the devices of all its scenarios, none of which shares a name, a place, a socket or a hub with another', () => {
    const own = scenario([
      { kind: 'vfio-user', id: 'nic', link: 'wire' },
      nic('judge', { link: { device: 'nic' } }),
      nic('left', { link: { hub: 0 } }),
      nic('right', { link: { hub: 0 } }),
    ]);
    const names = ['some', 'other'];
    const { args } = lineOf(names.map((name) => ({ name, scenario: own })));
    const all = args.filter((arg) => arg.startsWith('{')).map((arg) => JSON.parse(arg));
    const distinct = (values: readonly unknown[]) => expect(new Set(values).size).toBe(values.length);
    const functions = all.filter((one) => 'driver' in one);
    expect(functions.map((one) => one.id)).toEqual(
      names.flatMap((name) => own.devices.map(({ id }) => `${name}.${id}`)),
    );
    distinct(functions.map((one) => one.bus));
    distinct(functions.flatMap((one) => one.socket?.path ?? []));
    const netdevs = all.filter((one) => 'type' in one);
    distinct(netdevs.map((one) => one.id));
    distinct(netdevs.flatMap((one) => one.addr?.path ?? []));
    expect(netdevs.flatMap((one) => one.hubid ?? [])).toEqual([0, 0, 16, 16]);
    const ports = args.flatMap((arg) => /^pcie-root-port,id=(\S+),chassis=(\d+),addr=(\S+)$/.exec(arg)?.slice(1) ?? []);
    expect(ports.length).toBe(3 * functions.length);
    distinct(ports);
    distinct(args.flatMap((arg) => /^filter-dump,.*file=(.*)$/.exec(arg)?.[1] ?? []));
    expect(
      firstPlace(
        names.map((name) => ({ name, scenario: own })),
        'other',
      ),
    ).toBe(own.devices.length);
  });

  it('has the memory of the scenario that needs most', () => {
    const of = (memory?: number) => scenario([], memory === undefined ? {} : { memory });
    const { args } = lineOf([of(), of(1536), of(512)].map((s, i) => ({ name: `s${i}`, scenario: s })));
    expect(args[args.indexOf('-m') + 1]).toBe('1536M');
  });

  it('is started with the taps of the one scenario that has some', () => {
    const tapped = scenario([nic('tapped', { link: 'tap' })]);
    const both = [
      { name: 'a', scenario: scenario([nic('plain')]) },
      { name: 'b', scenario: tapped },
    ];
    expect(() => lineOf(both)).toThrow(/no taps/);
    const { command, args } = lineOf(both, { enter: ['unshare', '--net'], ip: 'ip' });
    expect(command).toBe('unshare');
    expect(args.join(' ')).toContain('tuntap add dev tap-tapped');
  });

  it('has room for another processor, or QEMU leaves out the memory barriers that the device needs', () => {
    for (const cpus of [undefined, 1, 2]) {
      const { args } = line(scenario([], cpus === undefined ? {} : { cpus }));
      const [, now, most] = /^(\d+),maxcpus=(\d+)$/.exec(args[args.indexOf('-smp') + 1]) ?? [];
      expect(Number(now)).toBe(cpus ?? 1);
      expect(Number(most)).toBeGreaterThan(Number(now));
    }
  });

  it('leaves the IOMMU out when told so, and narrows it', () => {
    expect(line(scenario([], { iommu: 'none' })).args.join(' ')).not.toMatch(/iommu/);
    expect(line(scenario([], { iommu: 39 })).args.join(' ')).toMatch(/aw-bits=39/);
  });

  it('puts each function behind a port of its own', () => {
    const args = line(scenario([nic('a'), nic('b')])).args.join(' ');
    expect(args).toMatch(/pcie-root-port,id=port-name.a,chassis=1,addr=0x10 /);
    expect(args).toMatch(/pcie-root-port,id=port-name.b,chassis=2,addr=0x11 /);
    expect(devicesOf(scenario([nic('a'), nic('b')]))).toMatchObject([{ bus: 'port-name.a' }, { bus: 'port-name.b' }]);
  });

  it('puts functions that belong together in one slot', () => {
    const together = [
      nic('x'),
      nic('a'),
      nic('b', { placement: { besides: 'a' } }),
      nic('c', { placement: { besides: 'a' } }),
    ];
    expect(devicesOf(scenario(together))).toMatchObject([
      { bus: 'port-name.x', addr: '0x0.0' },
      { bus: 'port-name.a', addr: '0x0.0', multifunction: true },
      { bus: 'port-name.a', addr: '0x0.1' },
      { bus: 'port-name.a', addr: '0x0.2' },
    ]);
    expect(devicesOf(scenario(together))[0]).not.toHaveProperty('multifunction');
  });

  it('connects the link of a device process with the NIC that names it', () => {
    const both = [{ kind: 'vfio-user', id: 'dev', link: 'wire' } as const, nic('judge', { link: { device: 'dev' } })];
    const { args, env, command } = line(scenario(both, { qemu: 'vfioUser' }));
    expect([command, env]).toEqual(['qemu11', { A: 'b' }]);
    const netdev = JSON.parse(args[args.indexOf('-netdev') + 1]);
    expect(netdev).toMatchObject({ type: 'stream', server: false, addr: { path: '/s/link-name.dev' } });
    expect(args.join(' ')).toMatch(/memory-backend-memfd/);
  });
});

describe('taps', () => {
  const nic = (id: string): QemuNic => ({
    kind: 'virtio-net',
    id,
    mac: '52:54:00:00:00:01',
    iommu: true,
    link: 'tap',
    queuePairs: 2,
  });
  const parts = { enter: ['unshare', '--net'], ip: "'/t/ip'" };

  it('are in a namespace of their own, each with a subnet, and QEMU takes the place of the shell that makes them', () => {
    const devices = [nic('a'), nic('b')];
    const line = withTaps(['qemu', '-x'], devices, parts, '/d');
    expect(line.slice(0, 4)).toEqual(['unshare', '--net', 'sh', '-c']);
    expect(line.slice(5)).toEqual(['sh', 'qemu', '-x']);
    const script = line[4].split('\n');
    expect(script).toContain("'/t/ip' tuntap add dev tap-a mode tap multi_queue");
    for (const { id } of devices) {
      const { host, guest } = tapAddresses(devices, id);
      expect(script).toContain(`'/t/ip' addr add ${host}/24 dev tap-${id}`);
      expect(script).toContain(`'/t/ip' neigh add ${guest} lladdr 52:54:00:00:00:01 dev tap-${id}`);
    }
    expect(script.at(-1)).toBe('exec "$@"');
    expect(new Set(devices.map(({ id }) => tapAddresses(devices, id).host)).size).toBe(2);
  });

  it('that cannot be had are an obstacle that is shown, with what is missing', () => {
    const result = {
      name: 'queues',
      title: 't',
      passed: false,
      seconds: 0,
      before: [],
      restarted: null,
      obstacle: 'no tap; it needs /dev/net/tun',
      checks: [],
      problems: [],
      console: [],
    };
    expect(resultTable([result])).toMatch(
      /not here[\s\S]*queues cannot be run here: no tap; it needs \/dev\/net\/tun\n/,
    );
  });

  it('are refused by a system without them with a reason', async () => {
    const tools = mkdtempSync(join(tmpdir(), 'vipsec-tools-'));
    try {
      await expect(tapSupport({ tools })).rejects.toThrow(/holds no ip/);
      // A loader that is no loader: whatever is asked of it fails.
      mkdirSync(join(tools, 'sbin'));
      mkdirSync(join(tools, 'lib/x86_64-linux-gnu'), { recursive: true });
      writeFileSync(join(tools, 'sbin/ip'), '');
      writeFileSync(join(tools, 'lib/x86_64-linux-gnu/ld-linux-x86-64.so.2'), '#!/bin/sh\necho no tun >&2; exit 1\n', {
        mode: 0o755,
      });
      await expect(tapSupport({ tools })).rejects.toThrow(/no multi-queue tap.*/);
    } finally {
      rmSync(tools, { recursive: true, force: true });
    }
  });
});

describe('interrupts of a function in the guest', () => {
  const table = [
    '           CPU0       CPU1',
    ' 31:          4          3  IR-PCI-MSI 524288-edge      vfio-msix[0](0000:01:00.0)',
    ' 32:        120          7  IR-PCI-MSI 524289-edge      vfio-msix[1](0000:01:00.0)',
    ' 33:          9          0  IR-PCI-MSI 524290-edge      vfio-msix[1](0000:02:00.0)',
    'NMI:          0          0   Non-maskable interrupts',
  ].join('\n');

  it('are counted over all processors, for each vector', () => {
    expect(countInterrupts(table, '0000:01:00.0', 0)).toBe(7);
    expect(countInterrupts(table, '0000:01:00.0', 1)).toBe(127);
    expect(countInterrupts(table, '0000:02:00.0', 1)).toBe(9);
  });

  it('are none where the vector is not in use', () => {
    expect(countInterrupts(table, '0000:02:00.0', 2)).toBe(0);
  });
});

describe('the kernel log as a judge', () => {
  it.each([
    '[    5.1] DMAR: [DMA Write NO_PASID] Request device [01:00.0] fault addr 0x1000 [fault reason 0x05]',
    '[    5.1] BUG: kernel NULL pointer dereference',
    '[    5.1] WARNING: CPU: 0 PID: 1 at drivers/iommu/iommu.c:1',
    'init: module gcm does not load',
  ])('%s fails a scenario', (text) => {
    expect(consoleFaults([text], [])).toEqual([text]);
    expect(consoleFaults([text], [/DMAR|BUG|WARNING|init/])).toEqual([]);
  });

  it('has nothing against an ordinary boot', () => {
    expect(consoleFaults(['[    1.4] DMAR: VT-d Scalable Mode not enabled, no PASID allocation'], [])).toEqual([]);
  });
});

describe('programs of the system', () => {
  it('that fail are reported with the end of what they said', async () => {
    await expect(run('sh', ['-c', 'echo reason >&2; exit 3'])).rejects.toThrow(/ended with 3:\nreason/);
  });

  it('that are missing are named', async () => {
    await expect(run('no-such-program-here', [])).rejects.toThrow('no-such-program-here is not installed');
  });
});
