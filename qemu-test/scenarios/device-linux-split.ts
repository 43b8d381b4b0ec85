/** As `device-linux-driver`, with split virtqueues. */
import { linuxScenario } from './device-linux-driver.ts';

export const scenario = linuxScenario(', with split virtqueues', 'split');
