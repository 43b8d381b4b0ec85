/** MSI-X through VFIO: configuration changes and received frames wake a process that sleeps. */
import { openFunction } from '../../src/index.ts';
import { bindFunction } from '../../src/vfio/bind.ts';
import { isTestFrame, testFrame } from '../bodies/frames.ts';
import { InterruptDriven } from '../bodies/interrupts.ts';
import { same } from '../guest/guest.ts';
import type { Scenario } from '../scenario.ts';

const MTU = 1500;
const FRAMES = 40;
const WAIT_MS = 5_000;

const Check = {
  config: 'a change of the link interrupts, down and up',
  receive: 'each frame wakes the receiver',
  suppressed: 'no interrupt comes while the receiver has not asked for one',
  again: 'after close and open interrupts work again',
} as const;

export const scenario: Scenario = {
  title: 'interrupts through MSI-X, eventfds and interrupt remapping',
  machine: { qemu: 'stock' },
  devices: [{ kind: 'virtio-net', id: 'nic', mac: '52:54:00:00:08:01', iommu: true, link: 'host' }],
  modules: ['virtio_pci', 'virtio_net', 'vfio_pci', 'vfio_iommu_type1'],
  timeout: 90,
  checks: Object.values(Check),

  async guest(guest) {
    const address = guest.address('nic');
    bindFunction(address);
    const fn = openFunction(address);
    const nic = await InterruptDriven.open(fn);
    await guest.check(Check.config, async () => {
      for (const up of [false, true]) {
        guest.tell('link', up);
        await nic.link(up, WAIT_MS);
      }
    });
    await guest.check(Check.receive, async () => {
      guest.tell('send');
      const woken = await nic.receive(FRAMES, isTestFrame, WAIT_MS);
      if (woken < FRAMES / 2) throw new Error(`woken ${woken} times for ${FRAMES} frames that came one by one`);
      return `woken ${woken} times for ${FRAMES} frames`;
    });
    await guest.check(Check.suppressed, async () => {
      nic.rx.disableInterrupts();
      guest.tell('send');
      await guest.hear('sent');
      same('interrupted', await nic.interrupted(500), false);
      await nic.receive(FRAMES, isTestFrame, WAIT_MS);
    });
    await nic.close();
    fn.close();
    await guest.check(Check.again, async () => {
      const second = openFunction(address);
      const again = await InterruptDriven.open(second);
      guest.tell('send');
      await again.receive(FRAMES, isTestFrame, WAIT_MS);
      await again.close();
      second.close();
    });
  },

  async host(host) {
    for (let i = 0; i < 2; i++) await host.qemu('set_link', { name: 'nic', up: await host.hear('link') });
    for (let i = 0; i < 3; i++) {
      await host.hear('send');
      for (let frame = 0; frame < FRAMES; frame++) {
        host.link('nic').send(testFrame('wire', frame, MTU));
        await new Promise((resolve) => setTimeout(resolve, 20));
      }
      host.tell('sent');
    }
  },
};
